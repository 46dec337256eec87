"""Draws images from a Stable Diffusion checkpoint: of one prompt, or of evaluation sets of tens of thousands."""

from flax_pref.config import parse_flags
from flax_pref.images.image_flags import ImageFlags


def main(arguments: list[str]) -> None:
    """Draws and writes the images."""
    flags = parse_flags(arguments, ImageFlags)
    from flax_pref.compilation import set_up
    from flax_pref.images.set_drawing import draw_images

    set_up()
    if images := draw_images(flags):
        print(f"wrote {images} image{'s' * (images != 1)}, manifest.parquet and contact_sheet.png to {flags.out}")
