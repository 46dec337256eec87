"""A negative module (NPO) for SDXL on Pick-a-Pic v2.

    python -m train.modules configs/sdxl/npo.py

Reads runs/pick_a_pic_sdxl, which `python -m train.encode configs/sdxl/encode_pick_a_pic.py` writes.

Settings: DPO-DPO-NPO/run_sdxl.sh of the authors' code (G-U-N/Diffusion-NPO; arXiv:2505.11245), where beta is 2000
with the factor 1/2, as here: only the trainer for SD1.5 lacks it. Its batch of 60 is that of one GPU, and how many
there were is not said; ours of 64 can be divided over 16 devices. It trains on Pick-a-Pic v1.

Hardware: 16 chips of TPU v5p, or 16 GPUs with 80 GB. Each takes 5.1 GB for the frozen weights, and about 2.6 GB for
the activations of a pair, by the ratio of adapters to full weights that was counted for Stable Diffusion 1.5.
Estimated from shapes; not measured.

Not run here. The paper reports better images from the base and from models that were aligned before, sampled with
this module instead of the base for the empty prompt.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import NPO
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL

config = SDXL.pairs(
    "npo",
    method=NPO(beta=2000.0),
    lora=LoRA(rank=8),
    input=InputConfig(batch_size=64),
    optimizer=OptimizerConfig(learning_rate=5e-6, weight_decay=0.01),
    steps=5000,
    accumulation=4,
)
