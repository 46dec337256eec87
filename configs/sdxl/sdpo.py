"""Diffusion-DPO with a safeguard of the winner (SDPO) for SDXL on Pick-a-Pic v2.

    python -m train.modules configs/sdxl/sdpo.py

Reads runs/pick_a_pic_sdxl, which `python -m train.encode configs/sdxl/encode_pick_a_pic.py` writes.

Settings: scripts/train/sdxl_diffusion_dpo.sh of the authors' code (AIDC-AI/Diffusion-SDPO; arXiv:2511.03317), whose
--scale_lr makes 1e-9 times the batch of it; on 8 GPUs its batch is 2,048.

Hardware: 16 chips of TPU v5p, or 16 GPUs with 80 GB. Memory per device: 4.5 GB for weights, optimizer and gradients,
and about 2.6 GB of activations for each pair, with rematerialised blocks. Estimated from shapes; not measured.

Not run here. The paper reports gains over Diffusion-DPO by scorers of preference, aesthetics and prompts, and a
winner's error that does not rise: watch winner in metrics.jsonl.
"""

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import SDPO
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SDXL

config = SDXL.pairs(
    "sdpo",
    method=SDPO(beta=5000.0, mu=0.6),
    weights="full",
    input=InputConfig(batch_size=2048, caption_dropout=0.2),
    optimizer=OptimizerConfig(name="adafactor", learning_rate=2.048e-6, warmup_steps=500, weight_decay=0.01),
    steps=2000,
    accumulation=128,
    mesh="data=-1,fsdp=8",
)
