"""Diffusion-DPO and its opposite (NPO) as positive and negative modules for Stable Diffusion 1.5 on Pick-a-Pic v2.

    python -m train.modules configs/sd15/dpo_modules.py

Reads runs/pick_a_pic_sd15, which `python -m train.encode configs/sd15/encode_pick_a_pic.py` writes.

Settings: those of configs/sd15/dpo.py for both modules. The choice is ours: no paper trains the two in one run.

Hardware: 16 chips of TPU v5e, or 8 GPUs with 80 GB, two pairs at a time. Memory per device: 4.8 GB for weights,
optimizer and gradients, and about 1.5 GB of activations for each pair, with rematerialised blocks. Estimated from
shapes; not measured.

Not run here, and nothing is published to compare it with.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import PositiveNegativeDPO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15

config = SD15.pairs(
    "dpo_modules",
    method=PositiveNegativeDPO(beta=5000.0),
    weights="full",
    input=InputConfig(batch_size=2048, caption_dropout=0.2),
    optimizer=OptimizerConfig(learning_rate=2.048e-5, warmup_steps=500, weight_decay=0.01),
    steps=2000,
    accumulation=128,
    mesh="data=-1,fsdp=8",
)
