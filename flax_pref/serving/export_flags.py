"""Flags of the export of a sampler. `serving.export.export_drawing` follows them."""

import dataclasses
from typing import Literal

from flax_pref.config import UserError
from flax_pref.diffusion.drawing_flags import SPACINGS, DrawingFlags

Platform = Literal["cpu", "tpu", "cuda"]
Format = Literal["stablehlo", "diffusers"]
# `RULES` of integrations/diffusers/pipeline.py.
GUIDED = (
    *("cfg", "fine_tuned", "pgd", "cpgd", "cpgd_conditional", "positive_only", "negative_only"),
    *("npo", "autoguidance", "multi"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFlags(DrawingFlags):
    """Exports a sampler for one device of each platform, or a pipeline of diffusers."""

    out: str
    """Folder to write; must not exist, or be empty."""
    format: Format = "stablehlo"
    """Kind of folder. stablehlo: programs for flax_pref.load_sampler; diffusers: a pipeline that draws the same with
    torch, by DiffusionPipeline.from_pretrained."""
    include_base: bool = False
    """With --format diffusers: write the weights of the model too (default: only its path or Hub id)."""
    platforms: tuple[Platform, ...] = ("cpu",)
    """Platforms to write a program for, with the same weights; none of them need be present. With dtype auto: float32
    for cpu alone, else bfloat16."""

    def __post_init__(self):
        super().__post_init__()
        if "://" in self.out:
            raise UserError(f"--out {self.out}: expected a local folder; mount the bucket, or copy the folder into it")
        if self.format == "diffusers":
            self._check_diffusers()
        elif self.include_base:
            raise UserError("--include-base applies to --format diffusers; other exports hold all weights")
        if not self.platforms or len(set(self.platforms)) != len(self.platforms):
            raise UserError(f"--platforms {' '.join(self.platforms)}: expected one or several of cpu, tpu and cuda")
        if self.attention not in ("auto", "xla"):
            raise UserError(
                f"--attention {self.attention}: expected auto or xla; a kernel of its own is for one device"
            )

    def _check_diffusers(self) -> None:
        """Checks that no flag asks for what a pipeline of diffusers has not, or decides itself."""
        advice = {
            "--platforms": (self.platforms != ("cpu",), "torch runs where it is; leave it out"),
            "--quantize": (self.quantize is not None, "set quantization_config in diffusers; leave it out"),
            "--attention": (self.attention != "auto", "torch chooses its kernel; leave it out"),
            "--batch-size": (self.batch_size != 1, "a call draws as many images as it is given prompts; leave it out"),
            "--merge": (self.merge or self.preset == "fast", "its rules guide by predictions; leave it out"),
            "--shaping": (self.shaping is not None, "its pipeline.py has none; leave it out, or cap by --w norm:SHARE"),
            "--sigmas ays": (self.sigmas == "ays", "expected karras, exponential or beta"),
            "--spacing": (self.spacing not in (None, *SPACINGS), f"expected {', '.join(SPACINGS)}"),
            "--dtype bfloat16": (self.dtype == "bfloat16", "expected float32 or float16, as files of diffusers have"),
        }
        for flag, (given, what) in advice.items():
            if given:
                raise UserError(f"{flag} does not apply to --format diffusers: {what}")
        if self.rule not in GUIDED:
            raise UserError(
                f"--rule {self.rule}: the pipeline.py of --format diffusers does not have it; expected one of "
                f"{', '.join(GUIDED)}"
            )

    @property
    def compute_dtype(self) -> str:
        """Precision of all programs."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if self.platforms == ("cpu",) else "bfloat16"
