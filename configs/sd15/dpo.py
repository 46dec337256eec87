"""Diffusion-DPO for Stable Diffusion 1.5 on Pick-a-Pic v2.

    python -m train.modules configs/sd15/dpo.py

Reads runs/pick_a_pic_sd15, which `python -m train.encode configs/sd15/encode_pick_a_pic.py` writes.

Settings: launchers/sd15.sh of the authors' code (SalesforceAIResearch/DiffusionDPO), whose --scale_lr makes 1e-8
times the batch of it. The paper (arXiv:2311.12908) says 2.048e-8 * 2000 / beta instead, a quarter of the steps for
the warm-up, and beta 2000 for its main results with this model.

Hardware: 16 chips of TPU v5e, or 8 GPUs with 80 GB, two pairs at a time. Memory per device: 2.5 GB for weights,
optimizer and gradients, and about 0.8 GB of activations for each pair, with rematerialised blocks. Estimated from
shapes; not measured.

Not run here. The launcher says about 24 hours for the 2,000 steps; the paper's machine has 16 A100.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import DiffusionDPO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15

config = SD15.pairs(
    "dpo",
    method=DiffusionDPO(beta=5000.0),
    weights="full",
    input=InputConfig(batch_size=2048, caption_dropout=0.2),
    optimizer=OptimizerConfig(learning_rate=2.048e-5, warmup_steps=500, weight_decay=0.01),
    steps=2000,
    accumulation=128,
    mesh="data=-1,fsdp=8",
)
