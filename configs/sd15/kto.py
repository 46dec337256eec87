"""Diffusion-KTO for Stable Diffusion 1.5 on Pick-a-Pic v2.

    python -m train.modules configs/sd15/kto.py

Reads runs/pick_a_pic_sd15, which `python -m train.encode configs/sd15/encode_pick_a_pic.py` writes.

Settings: exps/example.sh of the authors' code (jacklishufan/diffusion-kto; arXiv:2404.04465) with 8 images on 4 GPUs,
of which it draws 80 % among those preferred; here they are 4 pairs, half and half.

Hardware: 4 chips of TPU v5e, or 4 GPUs with 24 GB; a batch of 4 pairs has no more than one for each. Memory per
device: 4.0 GB for weights, optimizer and gradients, and about 0.8 GB of activations for each pair, with
rematerialised blocks. Estimated from shapes; not measured.

Not run here. The paper reports gains over Diffusion-DPO by human raters and scorers.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import KTO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15
from flax_pref.training.trainer import CheckpointConfig

config = SD15.pairs(
    "kto",
    method=KTO(beta=1000.0),
    weights="full",
    input=InputConfig(batch_size=4, caption_dropout=0.2),
    optimizer=OptimizerConfig(learning_rate=1e-7, warmup_steps=200, weight_decay=0.01),
    steps=20000,
    mesh="data=-1,fsdp=4",
    checkpoints=CheckpointConfig(every=1000),
)
