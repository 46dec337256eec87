"""TailorPO for Stable Diffusion 1.5, towards what PickScore prefers.

    python -m train.modules configs/sd15/tailorpo.py

Draws the prompts of configs/animals.txt; PickScore v1 is downloaded from the Hub once (4 GB), or is a folder that
`path` of its `Weighted` names; docs/rewards.md has other rewards. Settings: the paper (arXiv:2502.01667) takes those
of D3PO's code: 20 steps of DDIM with eta 1, guidance 5, beta 0.1, learning rate 3e-5; rank and batch are our choice.
TailorPO-G, which also follows the gradient of the reward, is `--method.rate`: one number here, where the paper's rate
rises from 0.1 to 0.2 on a cosine towards small t.

Hardware: 8 chips of TPU v5p, or 8 GPUs with 80 GB; each has all weights. Memory has not been measured.

Not run here. PickScore in the paper's Table 2 (SD1.5, 45 animal prompts): base 20.20, TailorPO 20.34, which is below
D3PO (20.40) and SPO (20.38) and above DDPO (20.24); TailorPO-G 20.68.
"""

from flax_pref.methods import TailorPO
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15
from flax_pref.training.rollouts import RolloutConfig

config = SD15.online(
    "tailorpo",
    method=TailorPO(beta=0.1),
    reward="pickscore",
    rollouts=RolloutConfig(prompts=64, at_once=16, batch_size=160),
    lora=LoRA(rank=4),
    optimizer=OptimizerConfig(learning_rate=3e-5, weight_decay=1e-4),
    steps=2000,
    accumulation=5,
)
