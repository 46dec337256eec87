"""MaPO for SDXL on Pick-a-Pic v2.

    python -m train.modules configs/sdxl/mapo.py

Reads runs/pick_a_pic_sdxl, which `python -m train.encode configs/sdxl/encode_pick_a_pic.py` writes.

Settings: the command in the README of the authors' code (mapo-t2i/mapo; arXiv:2406.06424), on the 8 GPUs it tells of:
16 pairs on each. AdamW keeps its moments in 8 bits there.

Hardware: 16 chips of TPU v5p, or 16 GPUs with 80 GB. Memory per device: 6.5 GB for weights, optimizer and gradients,
and about 2.6 GB of activations for each pair, with rematerialised blocks. Estimated from shapes; not measured.

Not run here. The authors' model card reports 22.5 for PickScore and 31.2 for HPSv2.1, against SDXL's 22.4 and 30.0.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import MaPO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL

config = SDXL.pairs(
    "mapo",
    method=MaPO(beta=0.1, snr=0.5),
    weights="full",
    input=InputConfig(batch_size=128),
    optimizer=OptimizerConfig(learning_rate=1e-5, weight_decay=0.01),
    steps=2000,
    accumulation=8,
    mesh="data=-1,fsdp=8",
)
