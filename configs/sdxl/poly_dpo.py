"""Poly-DPO for SDXL on Pick-a-Pic v2.

    python -m train.modules configs/sdxl/poly_dpo.py

Reads runs/pick_a_pic_sdxl, which `python -m train.encode configs/sdxl/encode_pick_a_pic.py` writes.

Settings: alpha 8 is what the authors of Poly-DPO found for this set with Stable Diffusion 1.5 (arXiv:2604.24953); to
take it for SDXL is our choice. The rest is that of configs/sdxl/dpo.py; the choice is ours: we know neither their
beta nor their optimizer.

Hardware: 16 chips of TPU v5p, or 16 GPUs with 80 GB. Memory per device: 4.5 GB for weights, optimizer and gradients,
and about 2.6 GB of activations for each pair, with rematerialised blocks. Estimated from shapes; not measured.

Not run here. The paper reports for SDXL on this set 2.32 points more than Diffusion-DPO for GenEval.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import DiffusionDPO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL

config = SDXL.pairs(
    "poly_dpo",
    method=DiffusionDPO(beta=5000.0, poly_alpha=8.0),
    weights="full",
    input=InputConfig(batch_size=2048, caption_dropout=0.2),
    optimizer=OptimizerConfig(name="adafactor", learning_rate=2.048e-5, warmup_steps=200, weight_decay=0.01),
    steps=2000,
    accumulation=128,
    mesh="data=-1,fsdp=8",
)
