"""Exports a sampler: as a program that a serving process loads without tracing, or as a pipeline of diffusers."""

from flax_pref.config import parse_flags
from flax_pref.serving.export_flags import ExportFlags


def main(arguments: list[str]) -> None:
    """Exports the sampler."""
    flags = parse_flags(arguments, ExportFlags)
    from flax_pref.compilation import set_up
    from flax_pref.serving.diffusers_export import export_diffusers
    from flax_pref.serving.export import export_drawing

    set_up()
    if flags.format == "diffusers":
        export_diffusers(flags)
        print(f"wrote a pipeline of diffusers to {flags.out}")
        return
    export_drawing(flags)
    print(f"wrote a sampler for {', '.join(flags.platforms)} in {flags.compute_dtype} to {flags.out}")
