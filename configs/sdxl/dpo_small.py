"""Diffusion-DPO for SDXL with LoRA on 4,000 pairs: one chip or GPU with 16 GB, in hours.

    python -m train.modules configs/sdxl/dpo_small.py

Reads runs/pick_a_pic_small_sdxl, which `python -m train.encode configs/sdxl/encode_small.py` writes.
"""

from pathlib import Path

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import DiffusionDPO
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL

config = SDXL.pairs(
    "dpo_small",
    method=DiffusionDPO(beta=2000.0),
    data=Path("runs/pick_a_pic_small_sdxl"),
    lora=LoRA(rank=16),
    input=InputConfig(batch_size=32, caption_dropout=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=50, weight_decay=0.01),
    steps=500,
    accumulation=32,
)
