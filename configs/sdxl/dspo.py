"""DSPO for SDXL on Pick-a-Pic v2.

    python -m train.modules configs/sdxl/dspo.py

Reads runs/pick_a_pic_sdxl, which `python -m train.encode configs/sdxl/encode_pick_a_pic.py` writes.

Settings: launchers/sdxl.sh and defaults of train.py of the authors' code (huaishengzhu/DSPO; ICLR 2025), whose
--scale_lr makes 1e-8 times the batch of it; on one GPU its batch is 2,048. Its loss for SDXL is another than that for
Stable Diffusion 1.5, the form "margin". Its README searches beta among 1000 to 5000 and finds 600 or 700 steps best:
the run writes its module, of 10 GB, at each 100.

Hardware: 16 chips of TPU v5p, or 16 GPUs with 80 GB. Memory per device: 4.5 GB for weights, optimizer and gradients,
and about 2.6 GB of activations for each pair, with rematerialised blocks. Estimated from shapes; not measured.

Not run here. The paper reports gains over other methods by scorers of preference; the launcher says about 30 hours
for 200 steps.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import DSPO
from flax_pref.training.export import ExportConfig
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL

config = SDXL.pairs(
    "dspo",
    method=DSPO(beta=5000.0, form="margin"),
    weights="full",
    input=InputConfig(batch_size=2048, caption_dropout=0.2),
    optimizer=OptimizerConfig(name="adafactor", learning_rate=2.048e-5, warmup_steps=200, weight_decay=0.01),
    steps=2000,
    accumulation=128,
    mesh="data=-1,fsdp=8",
    export=ExportConfig(every=100),
)
