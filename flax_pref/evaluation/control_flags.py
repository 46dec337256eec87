"""Flags of the controls that methods are compared with. `evaluation.run_controls` follows them."""

import dataclasses
import math

import tyro

from flax_pref.config import UserError
from flax_pref.models.choices import Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlFlags:
    """Draws and scores controls of the base model, and compares methods with them."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Runs of sample.images as FOLDER or NAME=FOLDER: the base model first, then the methods, all of one file of
    prompts and the same seeds."""
    prompts: str
    """File of prompts that the runs were drawn from."""
    validation: str
    """File of other prompts, on which the guidance scale of the base model is tuned."""
    column: str | None = None
    """Prompt column of both files (default: prompt, caption or text)."""
    rewards: tuple[str, ...]
    """Rewards that everything is scored with, as for sample.score: NAME, NAME=PATH, NAME=http://..."""
    by: str | None = None
    """Reward that tunes the guidance scale and chooses the best images (default: the first)."""
    guidance_scales: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0)
    """Guidance scales that are tried."""
    predictions: int | None = None
    """UNet predictions per image that a control may spend (default: those of the most expensive run)."""
    out: str = "runs/controls"
    """Folder for the runs of the controls, and for the report."""
    tokenizer: tuple[str, ...] = ()
    """Tokenizer of the rewards, as for sample.score (default: beside the weights, or as published)."""
    clip: str | None = None
    """Folder or Hub id of CLIP ViT-L/14 for aesthetic (default: as published)."""
    batch_size: int = 1
    """Images per device and batch, of drawing and of scoring."""
    mesh: str = "data=-1"
    """Device mesh; data=-1 divides the images over all devices."""
    dtype: Dtype = "auto"
    """Compute precision of drawing; auto: bfloat16 on TPUs and GPUs, float32 on CPUs."""

    def __post_init__(self):
        if len(self.runs) < 2:
            raise UserError("expected the run of the base model and one or more of methods, e.g. runs/base runs/cpgd")
        if not self.rewards:
            raise UserError("--rewards: none are given; expected one or more, e.g. pickscore hpsv2.1")
        names = [reward.partition("=")[0] for reward in self.rewards]
        if self.by is not None and self.by not in names:
            raise UserError(f"--by {self.by}: is none of the rewards; expected one of {', '.join(names)}")
        if len(set(self.guidance_scales)) < 3 or not all(0 <= s < math.inf for s in self.guidance_scales):
            raise UserError("--guidance-scales: expected three or more different numbers, 0 or more")
        for name in ("predictions", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
