"""Rewards that live elsewhere, asked in the background: devices draw while a service scores what they drew before."""

import functools
import operator
import threading
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from flax_pref.diffusion.latents import PIXELS
from flax_pref.rewards.decoded import rows_at_once
from flax_pref.rewards.remote import Answer, Remote, Service
from flax_pref.rewards.reward import Reward, WeightedSum
from flax_pref.shapes import PerImage


class HostImages(NamedTuple):
    """Images that the devices of this process have, on the host.

    Attributes:
        rows: numbers of the N images among those of all processes, int `[N]`.
        pixels: float32 `[N, H, W, 3]` in [0, 1].
    """

    rows: np.ndarray
    pixels: np.ndarray


class HostScores(NamedTuple):
    """Scores of images.

    Attributes:
        scores: float32 `[B]`, of the images of all processes; those of other processes are zero.
        unscored: how many of this process had none.
        own: how many images this process has.
    """

    scores: np.ndarray
    unscored: int
    own: int


class Asked(NamedTuple):
    """Scores that come.

    Attributes:
        images: on their way to the host; `get` waits until the devices are done with them.
        scores: by each reward that lives elsewhere.
    """

    images: Answer
    scores: list[Answer]


class SplitReward:
    """A reward in two parts: what the devices score, and what lives elsewhere.

    Attributes:
        local: a pytree, scored where images are.
        remote: asked from the host.
    """

    def __init__(self, reward: Reward):
        """Takes a weighted sum apart; a reward that is none counts once."""
        whole = reward if isinstance(reward, WeightedSum) else WeightedSum((reward,), (1.0,))
        parts, self._weights = whole.parts, whole.weights
        self._is_remote = [isinstance(part, Remote) for part in parts]
        self.local = tuple(part for part in parts if not isinstance(part, Remote))
        self.remote = tuple(part for part in parts if isinstance(part, Remote))
        self._one_call = threading.Lock()  # a function of the user's may not be made for threads

    def prepare(self, captions: Sequence[str]) -> tuple:
        """What `local` needs to know of captions; see `Reward`."""
        return tuple(part.prepare(captions) for part in self.local)

    def total(self, known: Sequence[PerImage], given: Sequence[PerImage]) -> PerImage:
        """The weighted sum in the order of its parts, while JAX traces.

        Args:
            known: scores by each of `local`.
            given: scores by each of `remote`.
        """
        left = {False: iter(known), True: iter(given)}
        parts = zip(self._weights, self._is_remote, strict=True)
        return functools.reduce(operator.add, (weight * next(left[is_remote]) for weight, is_remote in parts))

    def ask(self, images: jax.Array, captions: list[str]) -> Asked:
        """Begins to score images that the devices may still be drawing.

        Args:
            images: float32 `[B * K, H, W, 3]`, K of each caption; this process asks for those that its devices have.
            captions: B texts.
        """
        each = len(images) // len(captions)
        on_host = Answer(lambda: _on_host(images))

        def scores_by(part: Remote) -> Answer:
            return Answer(lambda: self._scores(part, on_host.get(), captions, each))

        return Asked(on_host, [scores_by(part) for part in self.remote])

    def _scores(self, part: Remote, images: HostImages, captions: list[str], each: int) -> HostScores:
        rows, pixels = images
        told = [captions[row // each] for row in rows.tolist()]
        if isinstance(part.function, Service):
            found = part.ask(pixels, told)
        else:
            at_once = rows_at_once(len(rows), PIXELS // (pixels.shape[1] * pixels.shape[2]))
            with self._one_call:
                groups = [slice(begin, begin + at_once) for begin in range(0, len(rows), at_once)]
                found = np.concatenate([part.ask(pixels[own], told[own]) for own in groups])
        scores = np.zeros(each * len(captions), np.float32)
        scores[rows] = neutral(found.reshape(-1, each)).ravel()
        return HostScores(scores, int((~np.isfinite(found)).sum()), len(rows))


def split_reward(reward: Reward) -> SplitReward | None:
    """A reward of which something lives elsewhere; None where nothing does."""
    parts = reward.parts if isinstance(reward, WeightedSum) else (reward,)
    return SplitReward(reward) if any(isinstance(part, Remote) for part in parts) else None


def neutral(scores: np.ndarray) -> np.ndarray:
    """Scores `[prompts, images]` with a mean for each that is not a finite number: nothing is learned from that image.

    The mean is that of the prompt's other images; where it has none, that of all.
    """
    finite = np.isfinite(scores)
    known = np.where(finite, scores, 0)
    of_all = known.sum(dtype=np.float64) / max(1, finite.sum())
    counts = finite.sum(axis=1, keepdims=True)
    means = np.where(counts > 0, known.sum(axis=1, keepdims=True, dtype=np.float64) / np.maximum(counts, 1), of_all)
    return np.where(finite, scores, means).astype(np.float32)


def _on_host(images: jax.Array) -> HostImages:
    """Waits for the images; a row that several devices have comes once."""
    shards = {shard.index[0].start or 0: shard for shard in images.addressable_shards}
    parts = [(start, np.asarray(shards[start].data)) for start in sorted(shards)]
    rows = np.concatenate([np.arange(start, start + len(part)) for start, part in parts])
    return HostImages(rows, np.concatenate([part for _, part in parts]))
