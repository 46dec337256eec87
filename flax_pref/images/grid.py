"""Image grids: one row per prompt, one column per method."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flax_pref.files import replacing

TILE, GAP, MARGIN, CAPTION_WIDTH = 128, 10, 20, 190  # pixels
INK, PAPER, FRAME = (32, 32, 36), (255, 255, 255), (205, 205, 210)


def font_of(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def image_grid(images: Mapping[str, np.ndarray], captions: Sequence[str], file: str | Path) -> None:
    """Draws the same prompts under every method.

    Args:
        images: by method, `[N, H, W, 3]` in [0, 1]. Small images are enlarged pixel by pixel, large ones reduced.
        captions: N prompts.
        file: PNG to be written; it appears under its name only when it is complete.

    Example:
        >>> prompts = ["a large red circle in the middle, white background"]
        >>> draw = fp.TextToImage(fp.load_pipeline("demo"), steps=2)
        >>> fp.image_grid({"s = 3": draw(prompts, rule=fp.cfg(3.0)), "s = 7.5": draw(prompts)}, prompts, "grid.png")
    """
    header, font = 34, font_of(13)
    width = 2 * MARGIN + CAPTION_WIDTH + len(images) * (TILE + GAP)
    height = 2 * MARGIN + header + len(captions) * (TILE + GAP) - GAP
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, (name, drawn) in enumerate(images.items()):
        left = MARGIN + CAPTION_WIDTH + GAP + column * (TILE + GAP)
        draw.text((left + TILE / 2, MARGIN + 8), name, fill=INK, font=font_of(16, bold=True), anchor="mm")
        for row, image in enumerate(drawn[: len(captions)]):
            top = MARGIN + header + row * (TILE + GAP)
            canvas.paste(_tile(image), (left, top))
            draw.rectangle((left - 1, top - 1, left + TILE, top + TILE), outline=FRAME)
    for row, caption in enumerate(captions):
        middle = MARGIN + header + row * (TILE + GAP) + TILE / 2
        text = wrapped(caption, font, CAPTION_WIDTH - GAP)
        draw.multiline_text((MARGIN, middle), text, fill=INK, font=font, anchor="lm", spacing=5)
    with replacing(file) as unfinished:
        canvas.save(unfinished, "PNG", optimize=True)


def _tile(image: np.ndarray) -> Image.Image:
    pixels = Image.fromarray(np.round(np.clip(image, 0, 1) * 255).astype(np.uint8))
    enlarged = max(pixels.size) <= TILE
    return pixels.resize((TILE, TILE), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text in lines of at most `width` pixels, where words allow it."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
