"""Positive and negative modules for SDXL with LoRA on 4,000 pairs: one chip or GPU with 16 GB, in hours.

    python -m train.modules configs/sdxl/modules_small.py

Reads runs/pick_a_pic_small_sdxl, which `python -m train.encode configs/sdxl/encode_small.py` writes.

Settings are our choice: the losses of the paper (arXiv:2602.18799), everything else as in configs/sdxl/dpo_small.py.

Hardware: one chip of TPU v5e (as Colab gives) or one GPU with 16 GB or more. Planned: one v5e chip holds 9.1 of its
15.75 GiB and takes 136 minutes; 8 chips (as Kaggle gives, with --accumulation 4) hold 9.0 GiB each and take 17 minutes.
Not measured on a TPU.

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
from flax_pref.training.recipes import SDXL

config = SDXL.pairs(
    "modules_small",
    method=PositiveNegative(),
    data=Path("runs/pick_a_pic_small_sdxl"),
    lora=LoRA(rank=16),
    input=InputConfig(batch_size=32, caption_dropout=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=50, weight_decay=0.01),
    steps=500,
    accumulation=32,
)
