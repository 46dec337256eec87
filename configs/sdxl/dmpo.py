"""DMPO for SDXL on Pick-a-Pic v2.

    python -m train.modules configs/sdxl/dmpo.py

Reads runs/pick_a_pic_sdxl, which `python -m train.encode configs/sdxl/encode_pick_a_pic.py` writes.

Settings: scripts/train/sdxl_dmpo.sh of AIDC-AI/Diffusion-SDPO (arXiv:2511.03317), code of others than the authors of
DMPO (arXiv:2507.07510), whose --scale_lr makes 1e-9 times the batch of it; on 8 GPUs its batch is 2,048. That script
adds the safeguard of SDPO; to leave it out is our choice.

Hardware: 16 chips of TPU v5p, or 16 GPUs with 80 GB. Memory per device: 4.5 GB for weights, optimizer and gradients,
and about 2.6 GB of activations for each pair, with rematerialised blocks. Estimated from shapes; not measured.

Not run here. The paper reports a higher PickScore than all its baselines for every model and set of prompts.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import DMPO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL

config = SDXL.pairs(
    "dmpo",
    method=DMPO(beta=6000.0, alpha=0.01),
    weights="full",
    input=InputConfig(batch_size=2048, caption_dropout=0.2),
    optimizer=OptimizerConfig(name="adafactor", learning_rate=2.048e-6, warmup_steps=500, weight_decay=0.01),
    steps=2000,
    accumulation=128,
    mesh="data=-1,fsdp=8",
)
