"""CHATS for SDXL on Pick-a-Pic v2.

    python -m train.modules configs/sdxl/chats.py

Reads runs/pick_a_pic_sdxl, which `python -m train.encode configs/sdxl/encode_pick_a_pic.py` writes.

Settings: scripts/train_sdxl.sh of the authors' code (AIDC-AI/CHATS; arXiv:2502.12579), whose --scale_lr makes 3e-9
times the batch of it: 16 pairs on each of 8 GPUs. It trains on 7,500 pairs of Open Image Preferences; Pick-a-Pic is
our choice.

Hardware: 16 chips of TPU v5p, or 16 GPUs with 80 GB. Memory per device: 8.4 GB for weights, optimizer and gradients,
and about 2.6 GB of activations for each pair, with rematerialised blocks. Estimated from shapes; not measured.

Not run here. The paper reports gains over Diffusion-DPO, sampled with the method's own rule.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import CHATS
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL

config = SDXL.pairs(
    "chats",
    method=CHATS(beta=1000.0, dropout=0.5),
    weights="full",
    input=InputConfig(batch_size=128),
    optimizer=OptimizerConfig(
        name="adafactor", learning_rate=3.84e-7, warmup_steps=100, weight_decay=0.01, clip_norm=None
    ),
    steps=6000,
    accumulation=8,
    mesh="data=-1,fsdp=8",
)
