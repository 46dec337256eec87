"""Diff-SNPO for Stable Diffusion 1.5 on Pick-a-Pic v2.

    python -m train.modules configs/sd15/snpo.py

Reads runs/pick_a_pic_sd15, which `python -m train.encode configs/sd15/encode_pick_a_pic.py` writes.

Settings: public notes on the paper (openreview.net/forum?id=CU5EHe1KUt, ICLR 2026) give beta, the mixture, AdamW, its
learning rate, batch and steps; second-hand. Warm-up (a quarter of the steps, as in the paper of Diffusion-DPO),
weight decay and the share of pairs that teach the empty prompt are our choice.

Hardware: 16 chips of TPU v5e, or 8 GPUs with 80 GB, two pairs at a time. Memory per device: 2.5 GB for weights,
optimizer and gradients, and about 0.8 GB of activations for each pair, with rematerialised blocks. Estimated from
shapes; not measured.

Not run here. The notes tell of 27.23 for HPSv2 and 0.694 for ImageReward with this model, against 26.24 and 0.122 of
the base and 26.55 and 0.297 of Diffusion-DPO, with DDIM, 50 steps and a guidance scale of 7.5; second-hand. Sample
with `--rule fine_tuned`: the module's empty prompt is the negative one.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import SNPO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15

config = SD15.pairs(
    "snpo",
    method=SNPO(beta=2000.0, mix=0.9, dropout=0.5),
    weights="full",
    input=InputConfig(batch_size=512),
    optimizer=OptimizerConfig(learning_rate=2.048e-8, warmup_steps=750, weight_decay=0.01),
    steps=3000,
    accumulation=32,
    mesh="data=-1,fsdp=8",
)
