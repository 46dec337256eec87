"""DSPO for Stable Diffusion 1.5 on Pick-a-Pic v2.

    python -m train.modules configs/sd15/dspo.py

Reads runs/pick_a_pic_sd15, which `python -m train.encode configs/sd15/encode_pick_a_pic.py` writes.

Settings: launchers/sd15.sh and defaults of train.py of the authors' code (huaishengzhu/DSPO; ICLR 2025), whose
--scale_lr makes 1e-8 times the batch of it; on one GPU its batch is 2,048. Its README searches beta among 0.001, 0.01
and 0.05 and finds 500, 1,000 or 1,500 steps best: the run writes its module at each 500.

Hardware: 16 chips of TPU v5e, or 8 GPUs with 80 GB, two pairs at a time. Memory per device: 2.5 GB for weights,
optimizer and gradients, and about 0.8 GB of activations for each pair, with rematerialised blocks. Estimated from
shapes; not measured.

Not run here. With this beta the loss stays close to denoising of winners. The paper reports gains over other methods
by scorers of preference; the launcher says about 24 hours for the 2,000 steps.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import DSPO
from flax_pref.training.export import ExportConfig
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15

config = SD15.pairs(
    "dspo",
    method=DSPO(beta=0.001),
    weights="full",
    input=InputConfig(batch_size=2048, caption_dropout=0.2),
    optimizer=OptimizerConfig(learning_rate=2.048e-5, warmup_steps=500, weight_decay=0.01),
    steps=2000,
    accumulation=128,
    mesh="data=-1,fsdp=8",
    export=ExportConfig(every=500),
)
