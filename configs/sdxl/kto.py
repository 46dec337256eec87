"""Diffusion-KTO for SDXL on Pick-a-Pic v2.

    python -m train.modules configs/sdxl/kto.py

Reads runs/pick_a_pic_sdxl, which `python -m train.encode configs/sdxl/encode_pick_a_pic.py` writes.

Settings: exps/example.sh of the authors' code (jacklishufan/diffusion-kto; arXiv:2404.04465) for Stable Diffusion
1.5, with Adafactor as in Diffusion-DPO's for SDXL, and 16 pairs, one for each device; no paper trains SDXL so. The
choice is ours.

Hardware: 16 chips of TPU v5p, or 16 GPUs with 80 GB. Memory per device: 3.2 GB for weights, optimizer and gradients,
and about 2.6 GB of activations for each pair, with rematerialised blocks. Estimated from shapes; not measured.

Not run here. Nothing is published to compare it with.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import KTO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL
from flax_pref.training.trainer import CheckpointConfig

config = SDXL.pairs(
    "kto",
    method=KTO(beta=1000.0),
    weights="full",
    input=InputConfig(batch_size=16, caption_dropout=0.2),
    optimizer=OptimizerConfig(name="adafactor", learning_rate=1e-7, warmup_steps=200, weight_decay=0.01),
    steps=20000,
    mesh="data=-1,fsdp=8",
    checkpoints=CheckpointConfig(every=1000),
)
