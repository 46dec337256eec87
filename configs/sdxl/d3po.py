"""D3PO for SDXL, towards small files.

    python -m train.modules configs/sdxl/d3po.py

Draws the prompts of configs/animals.txt and rewards what makes a small JPEG: the reward that needs no network of its
own. Settings: those for Stable Diffusion 1.5, which is our choice; the authors' code (yk7333/d3po, arXiv:2311.13231)
has none for SDXL.

Hardware: 8 chips of TPU v5p, or 8 GPUs with 80 GB; each has all weights. Memory has not been measured.

Not run here. The paper shows the size of the files falling over 400 rounds of drawing and training.
"""

from flax_pref.methods import D3PO
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL
from flax_pref.training.rollouts import RolloutConfig

config = SDXL.online(
    "d3po",
    method=D3PO(beta=0.1, ratio_clip=0.1),
    reward="compressibility",
    rollouts=RolloutConfig(prompts=64, at_once=8, batch_size=160),
    lora=LoRA(rank=4),
    optimizer=OptimizerConfig(learning_rate=3e-5, weight_decay=1e-4),
    steps=2000,
    accumulation=20,
)
