"""CHATS for Stable Diffusion 1.5 on Pick-a-Pic v2.

    python -m train.modules configs/sd15/chats.py

Reads runs/pick_a_pic_sd15, which `python -m train.encode configs/sd15/encode_pick_a_pic.py` writes.

Settings: scripts/train_sd15.sh of the authors' code (AIDC-AI/CHATS; arXiv:2502.12579), whose --scale_lr makes 1e-9
times the batch of it: 16 pairs on each of 8 GPUs. It trains on 7,500 pairs of Open Image Preferences; Pick-a-Pic is
our choice, as are 512 pixels instead of 1024.

Hardware: 16 chips of TPU v5e, or 8 GPUs with 80 GB, two pairs at a time. Memory per device: 4.8 GB for weights,
optimizer and gradients, and about 0.8 GB of activations for each pair, with rematerialised blocks. Estimated from
shapes; not measured.

Not run here. The paper reports gains over Diffusion-DPO, sampled with the method's own rule.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import CHATS
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15

config = SD15.pairs(
    "chats",
    method=CHATS(beta=1000.0, dropout=0.5),
    weights="full",
    input=InputConfig(batch_size=128),
    optimizer=OptimizerConfig(learning_rate=1.28e-7, warmup_steps=100, weight_decay=0.01),
    steps=2000,
    accumulation=8,
    mesh="data=-1,fsdp=8",
)
