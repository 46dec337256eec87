"""TailorPO for SDXL, towards what PickScore prefers.

    python -m train.modules configs/sdxl/tailorpo.py

Draws the prompts of configs/animals.txt; PickScore v1 is downloaded from the Hub once (4 GB), or is a folder that
`path` of its `Weighted` names; docs/rewards.md has other rewards. Settings: those for Stable Diffusion 1.5, which is
our choice; the paper (arXiv:2502.01667) has none for SDXL.
TailorPO-G, which also follows the gradient of the reward, is `--method.rate`: one number here, where the paper's rate
rises from 0.1 to 0.2 on a cosine towards small t.

Hardware: 8 chips of TPU v5p, or 8 GPUs with 80 GB; each has all weights. Memory has not been measured.

Not run here. PickScore in the paper's Table 2 (SD1.5, 45 animal prompts): base 20.20, TailorPO 20.34, which is below
D3PO (20.40) and SPO (20.38) and above DDPO (20.24); TailorPO-G 20.68.
"""

from flax_pref.methods import TailorPO
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL
from flax_pref.training.rollouts import RolloutConfig

config = SDXL.online(
    "tailorpo",
    method=TailorPO(beta=0.1),
    reward="pickscore",
    rollouts=RolloutConfig(prompts=64, at_once=8, batch_size=160),
    lora=LoRA(rank=4),
    optimizer=OptimizerConfig(learning_rate=3e-5, weight_decay=1e-4),
    steps=2000,
    accumulation=20,
)
