"""What a reward is, weighted sums of several, and rewards by their names in configs."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from flax_pref.checkpoints.hub import HUB_ID
from flax_pref.checkpoints.weights import Placement
from flax_pref.rewards.aesthetic import load_aesthetic_reward
from flax_pref.rewards.appearance import MEASURES, Appearance
from flax_pref.rewards.clip import load_clip_reward
from flax_pref.rewards.image_reward import load_image_reward
from flax_pref.rewards.jpeg import JpegSize
from flax_pref.rewards.judge import Judge
from flax_pref.rewards.mps import load_mps_reward
from flax_pref.rewards.remote import is_service, load_remote
from flax_pref.shapes import PerImage, Pixels, Tree


@runtime_checkable
class Reward(Protocol):
    """Scores images for their captions; more is better.

    A reward is a pytree of its weights, if it has any: an argument of jitted functions, as networks are. Scores of an
    image must not depend on the others of its batch. `reward.score(reward.view(images), reward.prepare(captions))`.
    """

    @property
    def name(self) -> str:
        """For logs and messages."""
        ...

    @property
    def differentiable(self) -> bool:
        """Whether scores have gradients with respect to images."""
        ...

    def prepare(self, captions: Sequence[str]) -> Tree:
        """What `score` needs to know of B captions, on the host: a pytree of numpy arrays `[B, ...]`."""
        ...

    def view(self, images: Pixels) -> Tree:
        """Images as `score` takes them: scaled, cut, normalised; can be jitted.

        Apart from `score`, so that images of another size compile only this again.
        """
        ...

    def score(self, view: Tree, prepared: Tree) -> PerImage:
        """Float32 scores of what `view` and `prepare` made of images and captions; can be jitted."""
        ...


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A reward by its name, what it counts, and where it is.

    Example:
        >>> rewards = (fp.Weighted("pickscore", 1.0), fp.Weighted("aesthetic", 0.5))
    """

    name: str
    """One of `REWARDS`; with an address or a function as path, any name."""
    weight: float = 1.0
    path: str | None = None
    """Folder, file or Hub id of its weights, `http://...`, or `python:MODULE:FUNCTION`; None: as published on the
    Hub."""
    clip: str | None = None
    """Of "aesthetic": folder or Hub id of CLIP ViT-L/14; None: as published."""
    tokenizer: str | None = None
    """Folder of its tokenizer, or a file of BERT's vocabulary; None: beside the weights, or as published."""


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

    def prepare(self, captions: Sequence[str]) -> tuple[Tree, ...]:
        """See `Reward`."""
        return tuple(part.prepare(captions) for part in self.parts)

    def view(self, images: Pixels) -> tuple[Tree, ...]:
        """See `Reward`."""
        return tuple(part.view(images) for part in self.parts)

    def score(self, view: tuple[Tree, ...], prepared: tuple[Tree, ...]) -> PerImage:
        """See `Reward`."""
        parts = zip(self.weights, self.parts, view, prepared, strict=True)
        scores = (weight * scores_of(part, seen, known) for weight, part, seen, known in parts)
        return functools.reduce(operator.add, scores)


def scores_of(reward: Reward, view: Tree, prepared: Tree) -> PerImage:
    """`reward.score(view, prepared)`, of a reward that may be a user's own.

    Raises:
        ValueError: it is not one number for each image.
    """
    scores, count = reward.score(view, prepared), len(jax.tree.leaves(view)[0])
    if jnp.shape(scores) != (count,):
        raise ValueError(
            f"{reward.name}: score returned shape {list(jnp.shape(scores))} for a batch of {count} images; expected "
            f"one number for each, [{count}]"
        )
    return scores


class Files(NamedTuple):
    """What a reward is loaded from; see `Weighted`."""

    path: str | None
    clip: str | None
    tokenizer: str | None
    how: Mapping[str, Any]
    """Arguments of every network: `dtype` and `place`."""


def _clip(name: str, files: Files) -> Reward:
    return load_clip_reward(name, files.path, tokenizer=files.tokenizer, **files.how)


REWARDS: dict[str, Callable[[str, Files], Reward]] = {
    "clip": _clip,
    "pickscore": _clip,
    "hpsv2": _clip,
    "hpsv2.1": _clip,
    "aesthetic": lambda name, files: load_aesthetic_reward(files.path, files.clip, **files.how),
    "imagereward": lambda name, files: load_image_reward(files.path, tokenizer=files.tokenizer, **files.how),
    "mps": lambda name, files: load_mps_reward(files.path, tokenizer=files.tokenizer, **files.how),
    "compressibility": lambda name, files: JpegSize(name, -1.0),
    "incompressibility": lambda name, files: JpegSize(name, 1.0),
    **dict.fromkeys(MEASURES, lambda name, files: Appearance(name)),
    "judge": lambda name, files: Judge(),
}


WITHOUT_GRADIENTS = ("compressibility", "incompressibility")


def has_gradients(reward: Weighted) -> bool:
    """Whether a reward is differentiable, by its name and before it is loaded; one that is not known here counts so."""
    return not is_service(reward.path) and reward.name not in WITHOUT_GRADIENTS


def load_reward(
    name: str,
    path: str | None = None,
    *,
    clip: str | None = None,
    tokenizer: str | None = None,
    dtype: Any = jnp.float32,
    place: Placement | None = None,
) -> Reward:
    """A reward by its name; arguments as in `Weighted`.

    Args:
        name: see `Weighted`.
        path: see `Weighted`.
        clip: see `Weighted`.
        tokenizer: see `Weighted`.
        dtype: what its networks compute in, and keep their weights in.
        place: says where each weight goes, see `parallel.pieces`; None: the default device.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is no reward of this name, or a file is not what it should be.
    """
    if path is not None and is_service(path):
        return load_remote(name, path)
    if name not in REWARDS:
        raise ValueError(f"rewards: no reward {name!r}; expected one of {', '.join(REWARDS)}")
    return REWARDS[name](name, Files(path, clip, tokenizer, {"dtype": dtype, "place": place}))


def check_rewards(rewards: Sequence[Weighted]) -> None:
    """That rewards are known and weighed, before anything is loaded.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is none, a name is unknown, or a weight is not finite.
    """
    if not rewards:
        raise ValueError(f"rewards: none are given; expected one or more of {', '.join(REWARDS)}")
    for reward in rewards:
        if not math.isfinite(reward.weight):
            raise ValueError(f"rewards: weight of {reward.name!r} is {reward.weight}; expected a finite number")
        if reward.name not in REWARDS and not is_service(reward.path):
            raise ValueError(f"rewards: no reward {reward.name!r}; expected one of {', '.join(REWARDS)}")
        for path in filter(None, (reward.path, reward.clip)):
            if not is_service(path) and not Path(path).expanduser().exists() and not HUB_ID.fullmatch(path):
                raise FileNotFoundError(f"rewards: {reward.name}: no file or folder {path}, and no Hub id (owner/name)")


def make_reward(
    rewards: Sequence[Weighted], *, dtype: Any = jnp.float32, place: Placement | None = None
) -> WeightedSum:
    """The weighted sum of rewards, as configs have it: `(Weighted("judge"), Weighted("compressibility", 0.01))`.

    Args:
        rewards: see `Weighted`.
        dtype: see `load_reward`.
        place: see `load_reward`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is none, a name is unknown, a weight is not finite, or a file is not what it should be.
    """
    check_rewards(rewards)
    parts = tuple(
        load_reward(reward.name, reward.path, clip=reward.clip, tokenizer=reward.tokenizer, dtype=dtype, place=place)
        for reward in rewards
    )
    return WeightedSum(parts, tuple(reward.weight for reward in rewards))
