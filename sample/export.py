"""Exports a sampler as a program that a serving process loads without tracing, with its weights and tokenizers.

    python -m sample.export --model PATH_OR_ID --steps 25 --batch-size 4 --out runs/exported
    python -m sample.export --model PATH_OR_ID --module pos=pos.safetensors --module neg=neg.safetensors --rule cpgd \\
        --w 4 --platforms tpu cuda --out runs/exported

Loaded by `flax_pref.serving.sampler.load_sampler`; docs/serving.md has what may differ from call to call. Flags are
those of `sample.images`.
"""

import dataclasses
import sys

from flax_pref.checkpoints.hub import find_checkpoint
from flax_pref.config import UserError, parse_flags, run_main
from flax_pref.files import check_new
from flax_pref.serving.export import Platform, export_sampler
from sample.options import (
    Drawing,
    check_drawing,
    check_modules,
    drawn_terms,
    fingerprints,
    modules_of,
    rule_of,
    text_to_image,
    with_preset,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Drawing):
    """Exports a sampler for one device of each platform."""

    out: str
    """Folder to write, which must not exist or be empty."""
    platforms: tuple[Platform, ...] = ("cpu",)
    """To write a program for each, of the same weights: where dtype is auto, float32 for cpu alone, else bfloat16. None
    of them need be here."""

    def __post_init__(self):
        super().__post_init__()
        if "://" in self.out:
            raise UserError(f"--out {self.out}: expected a local folder; mount the bucket, or copy the folder into it")
        if not self.platforms or len(set(self.platforms)) != len(self.platforms):
            raise UserError(f"--platforms {' '.join(self.platforms)}: expected one or several of cpu, tpu and cuda")
        if self.attention not in ("auto", "xla"):
            raise UserError(
                f"--attention {self.attention}: expected auto or xla; a kernel of its own is for one device"
            )


def main(arguments: list[str]) -> None:
    """Exports the sampler."""
    config = with_preset(parse_flags(arguments, Config))
    rule, sources = rule_of(config), modules_of(config)
    check_modules(rule, sources, config)
    check_new(config.out)
    folder = find_checkpoint(config.model, variant=config.variant)
    check_drawing(config, folder, sources)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if config.platforms == ("cpu",) else "bfloat16"
    draw = text_to_image(config, folder, rule, sources, dtype=dtype, batch_size=config.batch_size)
    about = {"model": config.model, "dtype": dtype, "quantize": config.quantize, "merge": config.merge}
    about |= fingerprints(config, folder, sources)
    export_sampler(draw, drawn_terms(config), config.out, platforms=config.platforms, about=about)
    print(f"wrote a sampler for {', '.join(config.platforms)} in {dtype} to {config.out}")


if __name__ == "__main__":
    sys.exit(run_main(main))
