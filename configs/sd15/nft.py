"""DiffusionNFT for Stable Diffusion 1.5, towards what PickScore prefers.

    python -m train.modules configs/sd15/nft.py

Draws the prompts of configs/animals.txt; PickScore v1 is downloaded from the Hub once (4 GB), or is a folder that
`path` of its `Weighted` names; docs/rewards.md has other rewards. Settings: config/nft.py and config/base.py of the
authors' code (NVlabs/DiffusionNFT, arXiv:2509.16117), which trains SD3.5 Medium: 48 prompts with 24 images each an
iteration, drawn in 10 steps without guidance, learned from at 9 of them, one update for all. Prompts and the number of
iterations are our choice.

Hardware: 8 chips of TPU v5e, or 8 GPUs with 24 GB; each has all weights. By `python -m train.plan configs/sd15/nft.py
--topology v5e:2x4`, a chip takes 6.0 GiB of its 15.75 for a step and 5.8 for drawing, and the reward's network (4 GB)
besides. Not measured on a TPU.

Not run here. The paper has no figures for Stable Diffusion 1.5.
"""

from flax_pref.methods import DiffusionNFT
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15
from flax_pref.training.rollouts import RolloutConfig

config = SD15.online(
    "nft",
    method=DiffusionNFT(images_per_prompt=24),
    reward="pickscore",
    rollouts=RolloutConfig(prompts=48, at_once=8, batch_size=10368),
    lora=LoRA(rank=32, alpha=64.0),
    optimizer=OptimizerConfig(learning_rate=3e-4, weight_decay=1e-4),
    steps=1000,
    accumulation=81,
)
