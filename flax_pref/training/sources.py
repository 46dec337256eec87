"""Where the batches of a run come from: a prepared set of pairs, or images that the run itself draws."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from flax_pref.checkpoints.diffusers import Pipeline
from flax_pref.data.pipeline import PairBatches
from flax_pref.data.prompts import Prompt
from flax_pref.diffusion.conditioning import encode_empty, encode_prompts, with_sizes
from flax_pref.models.unet import UNetConfig
from flax_pref.rewards.reward import Weighted
from flax_pref.training.rollouts import Prompts, RolloutConfig


class BatchSource(Protocol):
    """Endless batches whose place can be saved."""

    def next(self, params: Any) -> Any:
        """The next batch, global arrays on the mesh; it may be drawn with the modules as they are now."""
        ...

    def position(self) -> dict[str, Any]:
        """Where the next batch lies, as JSON can hold it."""
        ...

    def arrays(self) -> Any:
        """What else the next batches depend on: arrays whose shapes never change."""
        ...

    def restore(self, position: dict[str, Any], arrays: Any) -> None:
        """Goes to where `position` and `arrays` were asked for."""
        ...


class Pairs:
    """Batches of a preference set as a `BatchSource`."""

    def __init__(self, batches: PairBatches):
        self._batches = batches

    def next(self, params: Any) -> Any:
        """See `BatchSource`."""
        return next(self._batches)

    def position(self) -> dict[str, Any]:
        """See `BatchSource`."""
        return self._batches.state()

    def arrays(self) -> Any:
        """See `BatchSource`."""
        return {}

    def restore(self, position: dict[str, Any], arrays: Any) -> None:
        """See `BatchSource`."""
        self._batches.restore(position)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """What online methods draw, and what judges it.

    Example:
        >>> online = fp.OnlineConfig(prompts="prompts.txt", rewards=(fp.Weighted("pickscore"),), size=(512, 512))
        >>> online.rollouts.prompts
        64
    """

    prompts: str
    """File of prompts, see `data.prompts.read_prompts`: text, CSV, JSON, parquet, or a known set."""
    column: str | None = None
    """Of the file that has the texts; None: the first that is known."""
    rewards: tuple[Weighted, ...]
    """What is weighed into one score; see `flax_pref.rewards`."""
    rollouts: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    size: tuple[int, int] = (512, 512)
    """Height and width of the images in pixels."""


def encode_online_prompts(
    prompts: Sequence[Prompt], config: OnlineConfig, pipeline: Pipeline, unet: UNetConfig
) -> Prompts:
    """The prompts of an online run, encoded.

    Args:
        prompts: from the config's file.
        config: of the images.
        pipeline: encodes.
        unet: config of the network that is told of them.
    """
    captions = [prompt.text for prompt in prompts]
    told = encode_prompts(pipeline, captions), encode_empty(pipeline)
    text, empty = (with_sizes(conditioning, unet, config.size) for conditioning in told)
    return Prompts(captions=captions, ids=[prompt.id for prompt in prompts], text=text, empty=empty)
