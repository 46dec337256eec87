"""What the shipped configs of a model share; each config says what differs.

    config = SD15.pairs("dpo", method=DiffusionDPO(beta=5000.0), input=..., optimizer=..., steps=2000)

trains on runs/pick_a_pic_sd15 and writes runs/sd15/dpo.
"""

from pathlib import Path
from typing import Any, NamedTuple

from flax_pref.rewards.reward import Weighted
from flax_pref.training.rollouts import RolloutConfig
from flax_pref.training.sources import OnlineConfig
from flax_pref.training.trainer import TrainConfig


class Recipe(NamedTuple):
    """Configs of one model.

    Attributes:
        name: of its folders.
        model: Hub id.
        size: height and width of its images in pixels.
    """

    name: str
    model: str
    size: tuple[int, int]

    def pairs(self, name: str, **settings: Any) -> TrainConfig:
        """Trains on the encoded Pick-a-Pic v2; settings are those of `TrainConfig`."""
        return self._config(name, **{"data": Path(f"runs/pick_a_pic_{self.name}")} | settings)

    def online(self, name: str, *, reward: str, rollouts: RolloutConfig, **settings: Any) -> TrainConfig:
        """Trains on images that it draws of the 45 animals, towards one reward; settings are those of `TrainConfig`."""
        online = OnlineConfig(
            prompts="configs/animals.txt", rewards=(Weighted(reward),), rollouts=rollouts, size=self.size
        )
        return self._config(name, online=online, **settings)

    def _config(self, name: str, **settings: Any) -> TrainConfig:
        return TrainConfig(output=Path(f"runs/{self.name}/{name}"), model=self.model, remat="block", **settings)


SD15 = Recipe("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", (512, 512))
SDXL = Recipe("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", (1024, 1024))
