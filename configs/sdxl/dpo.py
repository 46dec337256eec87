"""Diffusion-DPO for SDXL on Pick-a-Pic v2.

    python -m train.modules configs/sdxl/dpo.py

Reads runs/pick_a_pic_sdxl, which `python -m train.encode configs/sdxl/encode_pick_a_pic.py` writes.

Settings: launchers/sdxl.sh of the authors' code (SalesforceAIResearch/DiffusionDPO), whose --scale_lr makes 1e-8
times the batch of it. The paper (arXiv:2311.12908) says 2.048e-8 * 2000 / beta instead, a quarter of the steps for
the warm-up. Code that builds on it takes a tenth of this learning rate for SDXL, as configs/sdxl/sdpo.py does.

Hardware: 16 chips of TPU v5p, or 16 GPUs with 80 GB. Memory per device: 4.5 GB for weights, optimizer and gradients,
and about 2.6 GB of activations for each pair, with rematerialised blocks. Estimated from shapes; not measured. By
plan (docs/planning.md) 256 chips of v5e do it too, a pair at a time each: `--mesh data=-1,fsdp=64 --accumulation 8`
takes 14.7 of their 15.75 GiB.

Not run here. The launcher says about 30 hours for 200 steps; the paper's machine has 16 A100. Its human raters
preferred the trained network to SDXL in about 70 % of cases.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import DiffusionDPO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL

config = SDXL.pairs(
    "dpo",
    method=DiffusionDPO(beta=5000.0),
    weights="full",
    input=InputConfig(batch_size=2048, caption_dropout=0.2),
    optimizer=OptimizerConfig(name="adafactor", learning_rate=2.048e-5, warmup_steps=200, weight_decay=0.01),
    steps=2000,
    accumulation=128,
    mesh="data=-1,fsdp=8",
)
