"""TailorPO for Stable Diffusion 1.5, towards a higher aesthetic score.

    python -m train.modules configs/sd15/tailorpo.py

Draws the prompts of configs/animals.txt. The reward, LAION's aesthetic predictor on CLIP ViT-L/14, is downloaded from
the Hub once (2 GB), or is what `path` and `clip` of its `Weighted` name; docs/rewards.md has other rewards. Settings:
the paper (arXiv:2502.01667): 20 steps of DDIM with eta 1, of which 5 are learned from, weights that change after each
of them, batches of 2, 10,000 trajectories. Guidance 5, beta 0.1 and learning rate 3e-5 are those of D3PO's code, which
the paper refers to; the rank is our choice.

Hardware: one chip or GPU with 16 GB; a batch of 2 keeps no more than two busy. For a mesh, learn from whole iterations:
--online.rollouts.update iteration --online.rollouts.prompts 64 --online.rollouts.at-once 16
--online.rollouts.batch-size 160 --steps 312 --accumulation 5. Memory has not been measured.

Not run here. The paper's Table 2 (SD1.5, 45 animal prompts; aesthetic score, with this reward): base 5.79, TailorPO
6.66, TailorPO-G 6.96; D3PO 6.46, DDPO 6.57, SPO 5.89.
"""

from flax_pref.methods import TailorPO
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15
from flax_pref.training.rollouts import RolloutConfig

config = SD15.online(
    "tailorpo",
    method=TailorPO(beta=0.1, train_steps=5),
    reward="aesthetic",
    rollouts=RolloutConfig(prompts=2, at_once=2, batch_size=2, update="step"),
    lora=LoRA(rank=4),
    optimizer=OptimizerConfig(learning_rate=3e-5, weight_decay=1e-4),
    steps=25_000,
)
