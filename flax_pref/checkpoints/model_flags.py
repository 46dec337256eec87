"""Settings that say which checkpoint is read, the same for every program; quick to import, for --help needs them."""

import dataclasses
from typing import Literal

PredictionType = Literal["epsilon", "v_prediction"]
PLACES = ("model", "vae", "text_encoders")  # of these settings, which name places


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which checkpoint is read; `checkpoints.diffusers.open_model` finds it."""

    model: str
    """Checkpoint: a folder in the diffusers layout, a single file (.safetensors or .ckpt) of Stable Diffusion 1.x, 2.x
    or XL, a Hub id (USER/NAME or USER/NAME@REVISION), or "demo" for the small model of this package."""
    variant: str | None = None
    """Weight file variant, e.g. fp16 (default: full precision if present)."""
    vae: str | None = None
    """Take the autoencoder from this checkpoint, or this autoencoder's own folder or file (default: the model's)."""
    text_encoders: str | None = None
    """Take text encoders and tokenizers from this checkpoint (default: the model's)."""
    prediction_type: PredictionType | None = None
    """Output of the UNet in a single file that does not record it (default: epsilon; Stable Diffusion 2.x has none)."""
    clip_skip: int | None = None
    """Layer of the text encoders that the UNet sees, counted from the last, as A1111 and Civitai count: 1 is the last
    (default: 1, or 2 for XL)."""
