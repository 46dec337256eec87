"""MaPO for Stable Diffusion 1.5 on Pick-a-Pic v2.

    python -m train.modules configs/sd15/mapo.py

Reads runs/pick_a_pic_sd15, which `python -m train.encode configs/sd15/encode_pick_a_pic.py` writes.

Settings: the command in the README of the authors' code (mapo-t2i/mapo; arXiv:2406.06424) for SDXL, on the 8 GPUs it
tells of: 16 pairs on each. No paper trains Stable Diffusion 1.5 so; the choice is ours.

Hardware: 16 chips of TPU v5e, or 8 GPUs with 80 GB, two pairs at a time. Memory per device: 2.3 GB for weights,
optimizer and gradients, and about 0.8 GB of activations for each pair, with rematerialised blocks. Estimated from
shapes; not measured.

Not run here, and nothing is published to compare it with.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import MaPO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15

config = SD15.pairs(
    "mapo",
    method=MaPO(beta=0.1, snr=0.5),
    weights="full",
    input=InputConfig(batch_size=128),
    optimizer=OptimizerConfig(learning_rate=1e-5, weight_decay=0.01),
    steps=2000,
    accumulation=8,
    mesh="data=-1,fsdp=8",
)
