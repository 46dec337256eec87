"""Positive and negative modules for SD1.5 with LoRA on 4,000 pairs: one chip or GPU with 16 GB, in hours.

    python -m train.modules configs/sd15/modules_small.py

Reads runs/pick_a_pic_small_sd15, which `python -m train.encode configs/sd15/encode_small.py` writes.

Settings are our choice: the losses of the paper (arXiv:2602.18799), everything else as in configs/sd15/dpo_small.py.

Hardware: one chip of TPU v5e (as Colab gives) or one GPU with 16 GB or more; 8 chips (as Kaggle gives) share each
batch. By `python -m train.plan configs/sd15/modules_small.py --topology v5e:1x1`, one v5e takes 5.1 GiB of its 15.75
(10.7 GiB are left) and trains 15 pairs/s at best: an hour and a quarter in all, or 12 minutes on 8 chips. Not measured
on a TPU.

Not run here. What metrics.jsonl shows when it works: `winner` and `loser`, the errors of the two modules, fall a little
below those of the first steps. They are noisy, since each step draws other noise levels; means of a hundred steps show
it. How far the modules are apart no metric shows: draw samples with cPGD. When it does not work: both stay where they
were (raise the learning rate), or samples get blurred or garish (lower it, or take fewer steps).
"""

from pathlib import Path

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import PositiveNegative
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.recipes import SD15

config = SD15.pairs(
    "modules_small",
    method=PositiveNegative(),
    data=Path("runs/pick_a_pic_small_sd15"),
    lora=LoRA(rank=16),
    input=InputConfig(batch_size=64, caption_dropout=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=50, weight_decay=0.01),
    steps=1000,
    accumulation=8,
)
