"""Diffusion-DPO for Stable Diffusion 1.5 with LoRA on 4,000 pairs: one chip or GPU with 16 GB, in hours.

    python -m train.modules configs/sd15/dpo_small.py

Reads runs/pick_a_pic_small_sd15, which `python -m train.encode configs/sd15/encode_small.py` writes.

Settings are our choice: the loss and its beta from the paper (arXiv:2311.12908), everything else for LoRA and a small
batch.

Hardware: one chip of TPU v5e (as Colab gives) or one GPU with 16 GB or more; 8 chips (as Kaggle gives) share each
batch. By `python -m train.plan configs/sd15/dpo_small.py --topology v5e:1x1`, one v5e takes 4.9 GiB of its 15.75 (10.8
GiB are left) and trains 13 pairs/s at best, or 11 with `--effort full`: about an hour and a half in all, or 15 to 20
minutes on 8 chips. Not measured on a TPU.

Not run here. What metrics.jsonl shows when it works: `loss` falls below 0.693, `accuracy` rises above 0.5 and stays
well below 1, as labels contradict each other, and `winner` stays below 0. When it does not: `loss` stays at 0.693
(raise the learning rate), `winner` rises above 0 (lower the learning rate, or take SDPO), or `accuracy` goes towards 1
(the pairs are learned by heart: fewer steps).
"""

from pathlib import Path

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import DiffusionDPO
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15

config = SD15.pairs(
    "dpo_small",
    method=DiffusionDPO(beta=2000.0),
    data=Path("runs/pick_a_pic_small_sd15"),
    lora=LoRA(rank=16),
    input=InputConfig(batch_size=64, caption_dropout=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=50, weight_decay=0.01),
    steps=1000,
    accumulation=8,
)
