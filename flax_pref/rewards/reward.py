"""What a reward is, weighted sums of several, and rewards by their names in configs."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from flax_pref.rewards.jpeg import JpegSize
from flax_pref.rewards.judge import Judge


class Reward(Protocol):
    """Scores images for their captions; more is better.

    A reward is a pytree of its weights, if it has any: an argument of jitted functions, as networks are. Scores of an
    image must not depend on the others of its batch.

    Attributes:
        name: for logs and messages.
        differentiable: whether scores have gradients with respect to images.
    """

    name: str
    differentiable: bool

    def prepare(self, captions: Sequence[str]) -> Any:
        """What `score` needs to know of B captions, on the host: a pytree of numpy arrays `[B, ...]`."""

    def score(self, images: jax.Array, prepared: Any) -> jax.Array:
        """Float32 `[B]` of images `[B, H, W, 3]` in [0, 1] and what `prepare` made of their captions; can be jitted."""


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A reward by its name, and what it counts."""

    name: str
    """One of `REWARDS`."""
    weight: float = 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedSum:
    """`sum of weight_k reward_k`, a `Reward`."""

    parts: tuple[Reward, ...]
    weights: tuple[float, ...] = dataclasses.field(metadata={"static": True})

    @property
    def name(self) -> str:
        """As in `1 judge + 0.01 compressibility`."""
        return " + ".join(f"{weight:g} {part.name}" for weight, part in zip(self.weights, self.parts, strict=True))

    @property
    def differentiable(self) -> bool:
        """Whether all parts are."""
        return all(part.differentiable for part in self.parts)

    def prepare(self, captions: Sequence[str]) -> tuple[Any, ...]:
        """See `Reward`."""
        return tuple(part.prepare(captions) for part in self.parts)

    def score(self, images: jax.Array, prepared: tuple[Any, ...]) -> jax.Array:
        """See `Reward`."""
        parts = zip(self.weights, self.parts, prepared, strict=True)
        return sum(weight * part.score(images, known) for weight, part, known in parts)


REWARDS: dict[str, Callable[[], Reward]] = {
    "judge": Judge,
    "compressibility": lambda: JpegSize("compressibility", -1.0),
    "incompressibility": lambda: JpegSize("incompressibility", 1.0),
}


def make_reward(rewards: Sequence[Weighted]) -> WeightedSum:
    """The weighted sum of rewards, as configs have it: `(Weighted("judge"), Weighted("compressibility", 0.01))`.

    Raises:
        ValueError: there is none, a name is unknown, or a weight is not finite.
    """
    if not rewards:
        raise ValueError(f"rewards: none are given; expected one or more of {', '.join(REWARDS)}")
    for reward in rewards:
        if reward.name not in REWARDS:
            raise ValueError(f"rewards: no reward {reward.name!r}; expected one of {', '.join(REWARDS)}")
        if not math.isfinite(reward.weight):
            raise ValueError(f"rewards: weight of {reward.name!r} is {reward.weight}; expected a finite number")
    return WeightedSum(tuple(REWARDS[reward.name]() for reward in rewards), tuple(reward.weight for reward in rewards))
