"""D3PO for Stable Diffusion 1.5, towards small files.

    python -m train.modules configs/sd15/d3po.py

Draws the prompts of configs/animals.txt and rewards what makes a small JPEG: the reward that needs no network of its
own. Settings: config/base.py of the authors' code (yk7333/d3po, arXiv:2311.13231), whose batch is that of one GPU;
the batch here is our choice.

Hardware: 8 chips of TPU v5p, or 8 GPUs with 80 GB; each has all weights. Memory has not been measured.

Not run here. The paper shows the size of the files falling over 400 rounds of drawing and training.
"""

from flax_pref.methods import D3PO
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15
from flax_pref.training.rollouts import RolloutConfig

config = SD15.online(
    "d3po",
    method=D3PO(beta=0.1, ratio_clip=0.1),
    reward="compressibility",
    rollouts=RolloutConfig(prompts=64, at_once=16, batch_size=160),
    lora=LoRA(rank=4),
    optimizer=OptimizerConfig(learning_rate=3e-5, weight_decay=1e-4),
    steps=2000,
    accumulation=5,
)
