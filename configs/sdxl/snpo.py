"""Diff-SNPO for SDXL on Pick-a-Pic v2.

    python -m train.modules configs/sdxl/snpo.py

Reads runs/pick_a_pic_sdxl, which `python -m train.encode configs/sdxl/encode_pick_a_pic.py` writes.

Settings: public notes on the paper (openreview.net/forum?id=CU5EHe1KUt, ICLR 2026) give beta, the mixture, AdamW, its
learning rate, batch and steps; second-hand. Warm-up (a quarter of the steps, as in the paper of Diffusion-DPO),
weight decay and the share of pairs that teach the empty prompt are our choice.

Hardware: 16 chips of TPU v5p, or 16 GPUs with 80 GB. Memory per device: 7.1 GB for weights, optimizer and gradients,
and about 2.6 GB of activations for each pair, with rematerialised blocks. Estimated from shapes; not measured.

Not run here. The notes tell of 28.33 for HPSv2 with SDXL, about that of Diff-NPO; second-hand. Sample with `--rule
fine_tuned`: the module's empty prompt is the negative one.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import SNPO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL

config = SDXL.pairs(
    "snpo",
    method=SNPO(beta=5000.0, mix=0.9, dropout=0.5),
    weights="full",
    input=InputConfig(batch_size=2048),
    optimizer=OptimizerConfig(learning_rate=2.048e-8, warmup_steps=156, weight_decay=0.01),
    steps=625,
    accumulation=128,
    mesh="data=-1,fsdp=8",
)
