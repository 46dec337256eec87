"""Diffusion-DPO with a safeguard of the winner (SDPO) for Stable Diffusion 1.5 on Pick-a-Pic v2.

    python -m train.modules configs/sd15/sdpo.py

Reads runs/pick_a_pic_sd15, which `python -m train.encode configs/sd15/encode_pick_a_pic.py` writes.

Settings: scripts/train/sd15_diffusion_dpo.sh of the authors' code (AIDC-AI/Diffusion-SDPO; arXiv:2511.03317), whose
--scale_lr makes 1e-8 times the batch of it; on 8 GPUs its batch is 2,048.

Hardware: 16 chips of TPU v5e, or 8 GPUs with 80 GB, two pairs at a time. Each takes 2.5 GB for weights, optimizer and
gradients, and about 0.8 GB for the activations of a pair, as blocks are computed again in the backward pass; counted
from shapes, but for the block in work, which is estimated. No machine has confirmed it.

Not run here. The paper reports gains over Diffusion-DPO by scorers of preference, aesthetics and prompts, and a
winner's error that does not rise: watch winner in metrics.jsonl.
"""

from pathlib import Path

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import SDPO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.trainer import TrainConfig

config = TrainConfig(
    output=Path("runs/sd15/sdpo"),
    model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    data=Path("runs/pick_a_pic_sd15"),
    method=SDPO(beta=5000.0, mu=0.9),
    weights="full",
    input=InputConfig(batch_size=2048, caption_dropout=0.2),
    optimizer=OptimizerConfig(learning_rate=2.048e-5, warmup_steps=500, weight_decay=0.01),
    steps=2000,
    accumulation=128,
    remat="block",
    mesh="data=-1,fsdp=8",
)
