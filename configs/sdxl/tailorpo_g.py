"""TailorPO-G for SDXL, towards a higher aesthetic score.

    python -m train.modules configs/sdxl/tailorpo_g.py

Draws the prompts of configs/animals.txt. The reward, LAION's aesthetic predictor on CLIP ViT-L/14, is downloaded from
the Hub once (2 GB), or is what `path` and `clip` of its `Weighted` name; docs/rewards.md has other rewards. Settings:
the paper (arXiv:2502.01667) has none for SDXL; those of the method are its for Stable Diffusion 1.5, with a rate that
rises from 0.1 to 0.2. Weights change after whole iterations of 64 prompts, which suits a mesh: that is our choice, and
so is the rank. 10,000 trajectories in all, as there.

Hardware: 8 chips of TPU v5p, or 8 GPUs with 80 GB; each has all weights. Memory has not been measured.

Not run here. The paper's Table 2 (SD1.5, 45 animal prompts; aesthetic score, with this reward): base 5.79, TailorPO
6.66, TailorPO-G 6.96; D3PO 6.46, DDPO 6.57, SPO 5.89.
"""

from flax_pref.methods import TailorPO
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL
from flax_pref.training.rollouts import RolloutConfig

config = SDXL.online(
    "tailorpo_g",
    method=TailorPO(beta=0.1, train_steps=5, rate=(0.1, 0.2)),
    reward="aesthetic",
    rollouts=RolloutConfig(prompts=64, at_once=8, batch_size=160),
    lora=LoRA(rank=4),
    optimizer=OptimizerConfig(learning_rate=3e-5, weight_decay=1e-4),
    steps=312,
    accumulation=20,
)
