"""A negative module (NPO) for Stable Diffusion 1.5 on Pick-a-Pic v2.

    python -m train.modules configs/sd15/npo.py

Reads runs/pick_a_pic_sd15, which `python -m train.encode configs/sd15/encode_pick_a_pic.py` writes.

Settings: DPO-DPO-NPO/run_sd15.sh of the authors' code (G-U-N/Diffusion-NPO; arXiv:2505.11245), where beta is 500
without the factor 1/2. Its batch of 64 is that of one GPU, and how many there were is not said; it trains on
Pick-a-Pic v1.

Hardware: 16 chips of TPU v5e, or 8 GPUs with 80 GB, two pairs at a time. Memory per device: 1.7 GB for the frozen
weights, and about 0.8 GB of activations for each pair, with rematerialised blocks. Estimated from shapes; not
measured.

Not run here. The paper reports better images from the base and from models that were aligned before, sampled with
this module instead of the base for the empty prompt.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import NPO
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15

config = SD15.pairs(
    "npo",
    method=NPO(beta=1000.0),
    lora=LoRA(rank=8),
    input=InputConfig(batch_size=64),
    optimizer=OptimizerConfig(learning_rate=5e-6, weight_decay=0.01),
    steps=5000,
    accumulation=4,
)
