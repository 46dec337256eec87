"""Poly-DPO for Stable Diffusion 1.5 on Pick-a-Pic v2.

    python -m train.modules configs/sd15/poly_dpo.py

Reads runs/pick_a_pic_sd15, which `python -m train.encode configs/sd15/encode_pick_a_pic.py` writes.

Settings: alpha 8 is what the authors of Poly-DPO found for this set and this model (arXiv:2604.24953). The rest is
that of configs/sd15/dpo.py; the choice is ours: we know neither their beta nor their optimizer.

Hardware: 16 chips of TPU v5e, or 8 GPUs with 80 GB, two pairs at a time. Memory per device: 2.5 GB for weights,
optimizer and gradients, and about 0.8 GB of activations for each pair, with rematerialised blocks. Estimated from
shapes; not measured.

Not run here. The authors' page (liming-ai/ViPO) reports for this model on the test prompts of Pick-a-Pic v2 21.48 for
PickScore, 28.30 for HPSv2.1, 0.679 for ImageReward and 49.87 for GenEval, against 20.95, 26.12, 0.297 and 43.00 of
Diffusion-DPO, and 20.57, 25.02, 0.085 and 42.34 of the base.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import DiffusionDPO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15

config = SD15.pairs(
    "poly_dpo",
    method=DiffusionDPO(beta=5000.0, poly_alpha=8.0),
    weights="full",
    input=InputConfig(batch_size=2048, caption_dropout=0.2),
    optimizer=OptimizerConfig(learning_rate=2.048e-5, warmup_steps=500, weight_decay=0.01),
    steps=2000,
    accumulation=128,
    mesh="data=-1,fsdp=8",
)
