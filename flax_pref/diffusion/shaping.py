"""Shapings: what is done to the contrast that a rule adds, from predictions that the step makes anyway.

A rule adds `w contrast` to its steady part. A shaping is a pure function of that product, of the steady part's own
predictions and of the step, which the sampler applies before it adds the result; it asks for no further prediction of
its own. Lengths and angles below are over the whole of one image's latents.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Steady(NamedTuple):
    """What the steady part of a rule predicts in a step, float32 `[B, H, W, C]`.

    Attributes:
        empty: for the empty prompt, the rule at s = 0.
        text: for the text, the rule at s = 1.
        guided: the rule at its guidance scale.
        clean: the estimate of the clean latents that belongs to text.
        clean_per_pred: by how much that estimate moves with its prediction, a scalar below 0.
    """

    empty: jax.Array
    text: jax.Array
    guided: jax.Array
    clean: jax.Array
    clean_per_pred: jax.Array


# (w contrast [B, H, W, C], Steady, what the step before remembered, numbers [P]) -> what is added, what is remembered.
Apply = Callable[[jax.Array, Steady, jax.Array | None, jax.Array], tuple[jax.Array, jax.Array | None]]


class Shaping(NamedTuple):
    """An entry of the table.

    Attributes:
        apply: see `Apply`.
        numbers: names of its numbers, each with its default; None: it must be given.
        remembers: whether it has a memory `[B, H, W, C]`, which begins with zeros.
    """

    apply: Apply
    numbers: Mapping[str, float | None]
    remembers: bool = False


def length(x: jax.Array) -> jax.Array:
    """Euclidean length of each image, `[B, H, W, C] -> [B, 1, 1, 1]`."""
    return jnp.sqrt(jnp.square(x).sum(axis=(1, 2, 3), keepdims=True))


def ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x / y`, and 0 where y is 0: what has no length has no direction."""
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def along(x: jax.Array, direction: jax.Array) -> jax.Array:
    """The part of x that is parallel to a direction, image by image."""
    product = (x * direction).sum(axis=(1, 2, 3), keepdims=True)
    return ratio(product, jnp.square(length(direction))) * direction


def norm_matched(contrast: jax.Array, steady: Steady) -> jax.Array:
    """The contrast, as long as what classifier-free guidance adds: `|CFG - uncond| contrast / |contrast|`."""
    return ratio(length(steady.guided - steady.empty), length(contrast)) * contrast


def _cap(added, steady, memory, numbers):
    """At most a share of the length of what classifier-free guidance adds, `|CFG - uncond|`."""
    most = numbers[0] * length(steady.guided - steady.empty)
    return jnp.minimum(1, jnp.where(length(added) == 0, 1, ratio(most, length(added)))) * added, memory


def _orthogonal(added, steady, memory, numbers):
    """Without its part along `text - empty`, by which w would act as a larger guidance scale."""
    return added - along(added, steady.text - steady.empty), memory


def _apg(added, steady, memory, numbers):
    """Adaptive projected guidance (arXiv:2410.02416, section 4) of the difference that the contrast makes to x_0.

    `d = difference + momentum d_before`, at most `radius` long; of it, the part orthogonal to the clean estimate, and
    `parallel` times the rest. The published difference is that of classifier-free guidance.
    """
    parallel, radius, momentum = numbers
    running = steady.clean_per_pred * added + momentum * memory
    far = length(running)
    moved = jnp.where(far > radius, ratio(radius, far), 1) * running
    part = along(moved, steady.clean)
    return (moved - part + parallel * part) / steady.clean_per_pred, running


def _decay(added, steady, memory, numbers):
    """MAMBO-G's decay (arXiv:2508.03442): `exp(-alpha |added| / |uncond|)` times itself, less where it is far off."""
    return jnp.exp(-numbers[0] * ratio(length(added), length(steady.empty))) * added, memory


SHAPINGS: dict[str, Shaping] = {
    "cap": Shaping(_cap, {"share": None}),
    "orthogonal": Shaping(_orthogonal, {}),
    "apg": Shaping(_apg, {"parallel": 0.0, "radius": float("inf"), "momentum": 0.0}, remembers=True),
    "decay": Shaping(_decay, {"alpha": None}),
}


def parse_shaping(text: str) -> tuple[str, tuple[float, ...]]:
    """Reads `orthogonal`, `cap:0.5`, `apg`, `apg:0:2.5:-0.5` or `decay:1`: a name and its numbers.

    Raises:
        ValueError: there is no such shaping, or its numbers are not these.
    """
    name, *given = text.split(":")
    if name not in SHAPINGS:
        raise ValueError(f"no shaping {name!r}; expected {', '.join(SHAPINGS)}")
    names = SHAPINGS[name].numbers
    try:
        defaults = [default for default in list(names.values())[len(given) :] if default is not None]
        values = (*map(float, given), *defaults)
        if len(values) != len(names) or any(value != value for value in values):
            raise ValueError
    except ValueError:
        usage = ":".join([name, *(f"{key.upper()}" for key in names)])
        raise ValueError(f"{text!r} is no shaping; expected {usage}, of numbers") from None
    return name, values
