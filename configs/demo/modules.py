"""Positive and negative modules on the demo's pairs.

    python -m train.modules configs/demo/modules.py

Reads runs/demo/prepared, which `python -m train.encode configs/demo/encode.py` writes. The settings are those of
positive_negative in configs/demo/demo.py.
"""

from pathlib import Path

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import PositiveNegative
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.samples import SampleConfig
from flax_pref.training.trainer import TrainConfig

config = TrainConfig(
    output=Path("runs/demo/modules"),
    model="demo",
    data=Path("runs/demo/prepared"),
    method=PositiveNegative(),
    lora=LoRA(rank=16),
    input=InputConfig(batch_size=16, caption_dropout=0.2),
    optimizer=OptimizerConfig(learning_rate=5e-4, b2=0.99, schedule="cosine", warmup_steps=10),
    steps=100,
    samples=SampleConfig(guidance_scale=3.0, steps=8),
)
