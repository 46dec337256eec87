"""DDPO for Stable Diffusion 1.5, towards small files.

    python -m train.modules configs/sd15/ddpo.py

Draws the prompts of configs/animals.txt and rewards what makes a small JPEG: the reward that needs no network of its
own. Settings: 50 steps of DDIM with eta 1, guidance 5, 256 images in a round and the clips are those of the paper
(arXiv:2305.13301) and of kvablack/ddpo-pytorch; learning rate, batch and rank for adapters are our choice.

Hardware: 8 chips of TPU v5p, or 8 GPUs with 80 GB; each has all weights. Memory has not been measured.

Not run here. The paper shows the size of the files falling steadily over its 50,000 drawn images.
"""

from flax_pref.methods import DDPO
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15
from flax_pref.training.rollouts import RolloutConfig

config = SD15.online(
    "ddpo",
    method=DDPO(steps=50, images_per_prompt=8, ratio_clip=1e-4, advantage_clip=10.0),
    reward="compressibility",
    rollouts=RolloutConfig(prompts=32, at_once=16, batch_size=160),
    lora=LoRA(rank=4),
    optimizer=OptimizerConfig(learning_rate=3e-4, weight_decay=1e-4),
    steps=2000,
    accumulation=5,
)
