"""Positive and negative modules for Stable Diffusion 1.5 on Pick-a-Pic v2.

    python -m train.modules configs/sd15/modules.py

Reads runs/pick_a_pic_sd15, which `python -m train.encode configs/sd15/encode_pick_a_pic.py` writes.

Settings: those of the authors' code (arXiv:2602.18799) for SDXL, with AdamW as in Diffusion-DPO's for this model;
those for Stable Diffusion 1.5 are not public. The choice is ours.

Hardware: 16 chips of TPU v5e, or 8 GPUs with 80 GB, two pairs at a time. Memory per device: 4.6 GB for weights,
optimizer and gradients, and about 0.8 GB of activations for each pair, with rematerialised blocks. Estimated from
shapes; not measured.

Not run here. The paper reports gains over Diffusion-DPO for this model too.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import PositiveNegative
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15

config = SD15.pairs(
    "modules",
    method=PositiveNegative(),
    weights="full",
    input=InputConfig(batch_size=2048, caption_dropout=0.2),
    optimizer=OptimizerConfig(learning_rate=2.048e-6, warmup_steps=200, weight_decay=0.01),
    steps=2000,
    accumulation=128,
    mesh="data=-1,fsdp=8",
)
