"""Diffusion-DPO and its opposite (NPO) as positive and negative modules for SDXL on Pick-a-Pic v2.

    python -m train.modules configs/sdxl/dpo_modules.py

Reads runs/pick_a_pic_sdxl, which `python -m train.encode configs/sdxl/encode_pick_a_pic.py` writes.

Settings: those of configs/sdxl/dpo.py for both modules. The choice is ours: no paper trains the two in one run.

Hardware: 16 chips of TPU v5p, or 16 GPUs with 80 GB. Memory per device: 8.4 GB for weights, optimizer and gradients,
and about 5.1 GB of activations for each pair, with rematerialised blocks. Estimated from shapes; not measured.

Not run here, and nothing is published to compare it with.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import PositiveNegativeDPO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL

config = SDXL.pairs(
    "dpo_modules",
    method=PositiveNegativeDPO(beta=5000.0),
    weights="full",
    input=InputConfig(batch_size=2048, caption_dropout=0.2),
    optimizer=OptimizerConfig(name="adafactor", learning_rate=2.048e-5, warmup_steps=200, weight_decay=0.01),
    steps=2000,
    accumulation=128,
    mesh="data=-1,fsdp=8",
)
