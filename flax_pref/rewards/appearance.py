"""Measures of how images look, whatever their captions: signs of a reward that is exploited, and no quality.

Methods that chase a reward often draw more saturated, harder or over-sharpened images; reports show these beside the
rewards.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from flax_pref.shapes import PerImage, Pixels

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


def saturation(images: jax.Array) -> jax.Array:
    """Mean saturation of HSV, `(max - min) / max` of a pixel's channels and 0 for black: from 0 to 1."""
    largest, smallest = images.max(axis=-1), images.min(axis=-1)
    black = largest <= 0
    return jnp.where(black, 0.0, (largest - smallest) / jnp.where(black, 1.0, largest)).mean(axis=(1, 2))


def contrast(images: jax.Array) -> jax.Array:
    """RMS contrast: standard deviation of the luma, from 0 to 0.5."""
    luma = _luma(images)
    variance = jnp.square(luma - luma.mean(axis=(1, 2), keepdims=True)).mean(axis=(1, 2))
    even = variance <= 0  # where the root has no gradient
    return jnp.where(even, 0.0, jnp.sqrt(jnp.where(even, 1.0, variance)))


def sharpness(images: jax.Array) -> jax.Array:
    """Variance of the Laplacian of the luma in levels of 0 to 255, mirrored at the edges; 0 where all is even."""
    luma = 255 * _luma(images)
    x = jnp.pad(luma, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    around = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
    return (around - 4 * luma).var(axis=(1, 2))


def _luma(images: jax.Array) -> jax.Array:
    return (images * jnp.asarray(LUMA, images.dtype)).sum(axis=-1)


MEASURES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "saturation": saturation,
    "contrast": contrast,
    "sharpness": sharpness,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Appearance:
    """One of `MEASURES` as a `Reward`."""

    name: str = dataclasses.field(metadata={"static": True})

    differentiable = True

    def prepare(self, captions: Sequence[str]) -> tuple[()]:
        """Nothing: captions do not matter."""
        return ()

    def view(self, images: Pixels) -> Pixels:
        """The images as they are."""
        return images

    def score(self, view: Pixels, prepared: tuple[()]) -> PerImage:
        """See `rewards.reward.Reward`."""
        return MEASURES[self.name](jnp.asarray(view))
