"""Flags of the export of a sampler. `serving.export.export_drawing` follows them."""

import dataclasses
from typing import Literal

from flax_pref.config import UserError
from flax_pref.diffusion.drawing_flags import DrawingFlags

Platform = Literal["cpu", "tpu", "cuda"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFlags(DrawingFlags):
    """Exports a sampler for one device of each platform."""

    out: str
    """Folder to write; must not exist, or be empty."""
    platforms: tuple[Platform, ...] = ("cpu",)
    """Platforms to write a program for, with the same weights; none of them need be present. With dtype auto: float32
    for cpu alone, else bfloat16."""

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

    @property
    def compute_dtype(self) -> str:
        """Precision of all programs."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if self.platforms == ("cpu",) else "bfloat16"
