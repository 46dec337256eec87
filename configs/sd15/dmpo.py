"""DMPO for Stable Diffusion 1.5 on Pick-a-Pic v2.

    python -m train.modules configs/sd15/dmpo.py

Reads runs/pick_a_pic_sd15, which `python -m train.encode configs/sd15/encode_pick_a_pic.py` writes.

Settings: scripts/train/sd15_dmpo.sh of AIDC-AI/Diffusion-SDPO (arXiv:2511.03317), code of others than the authors of
DMPO (arXiv:2507.07510), whose --scale_lr makes 1e-8 times the batch of it; on 8 GPUs its batch is 2,048. That script
adds the safeguard of SDPO; to leave it out is our choice.

Hardware: 16 chips of TPU v5e, or 8 GPUs with 80 GB, two pairs at a time. Memory per device: 2.5 GB for weights,
optimizer and gradients, and about 0.8 GB of activations for each pair, with rematerialised blocks. Estimated from
shapes; not measured.

Not run here. The paper reports a higher PickScore than all its baselines for every model and set of prompts.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import DMPO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15

config = SD15.pairs(
    "dmpo",
    method=DMPO(beta=2000.0, alpha=0.01),
    weights="full",
    input=InputConfig(batch_size=2048, caption_dropout=0.2),
    optimizer=OptimizerConfig(learning_rate=2.048e-5, warmup_steps=500, weight_decay=0.01),
    steps=2000,
    accumulation=128,
    mesh="data=-1,fsdp=8",
)
