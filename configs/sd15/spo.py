"""SPO for Stable Diffusion 1.5, towards small files.

    python -m train.modules configs/sd15/spo.py

Draws the prompts of configs/animals.txt and rewards what makes a small JPEG: the reward that needs no network of its
own. Settings: spo_sd-v1-5_4k-prompts_num-sam-4_10ep_bs10.py of the authors' code (RockeyCoss/SPO, arXiv:2406.04314),
which has a preference model for noisy images, 4,000 prompts and a threshold of 0.3 on its probabilities; batch and
steps are our choice.

Hardware: 8 chips of TPU v5p, or 8 GPUs with 80 GB; each has all weights. Memory has not been measured.

Not run here. The paper's figures are for its own preference model and cannot be compared.
"""

from flax_pref.methods import SPO
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15
from flax_pref.training.rollouts import RolloutConfig

config = SD15.online(
    "spo",
    method=SPO(beta=10.0, pool=4, skip=4, ratio_clip=0.1),
    reward="compressibility",
    rollouts=RolloutConfig(prompts=64, at_once=16, batch_size=128),
    lora=LoRA(rank=4),
    optimizer=OptimizerConfig(learning_rate=6e-5, weight_decay=1e-4),
    steps=2000,
    accumulation=4,
)
