"""Positive and negative modules for SDXL on Pick-a-Pic v2.

    python -m train.modules configs/sdxl/modules.py

Reads runs/pick_a_pic_sdxl, which `python -m train.encode configs/sdxl/encode_pick_a_pic.py` writes.

Settings: those of the authors' code (arXiv:2602.18799): 1e-9 times the batch, Adafactor, at most 2,000 steps of which
200 warm up, a fifth of the captions dropped.

Hardware: 16 chips of TPU v5p, or 16 GPUs with 80 GB. Memory per device: 7.7 GB for weights, optimizer and gradients,
and about 2.6 GB of activations for each pair, with rematerialised blocks. Estimated from shapes; not measured.

Not run here. The paper reports an average win rate over SDXL of 76.9 % for PGD with merged weights and 66.3 % for
Diffusion-DPO; that of cPGD, the rule for these modules, is not known to us.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import PositiveNegative
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL

config = SDXL.pairs(
    "modules",
    method=PositiveNegative(),
    weights="full",
    input=InputConfig(batch_size=2048, caption_dropout=0.2),
    optimizer=OptimizerConfig(name="adafactor", learning_rate=2.048e-6, warmup_steps=200, weight_decay=0.01),
    steps=2000,
    accumulation=128,
    mesh="data=-1,fsdp=8",
)
