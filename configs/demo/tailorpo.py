"""TailorPO on the demo's prompts, with the demo's judge as the reward.

    python -m train.modules configs/demo/tailorpo.py

Reads the captions of runs/demo/pairs.parquet, which `make demo` writes.
"""

from pathlib import Path

from flax_pref.methods import TailorPO
from flax_pref.rewards.reward import Weighted
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.rollouts import RolloutConfig
from flax_pref.training.samples import SampleConfig
from flax_pref.training.sources import OnlineConfig
from flax_pref.training.trainer import TrainConfig

config = TrainConfig(
    output=Path("runs/demo/tailorpo"),
    model="demo",
    method=TailorPO(steps=10, guidance_scale=3.0),
    online=OnlineConfig(
        prompts="runs/demo/pairs.parquet",
        rewards=(Weighted("judge"),),
        rollouts=RolloutConfig(prompts=32, at_once=32, batch_size=80),
        size=(64, 64),
    ),
    lora=LoRA(rank=16),
    optimizer=OptimizerConfig(learning_rate=3e-4),
    steps=100,
    samples=SampleConfig(guidance_scale=3.0, steps=10),
)
