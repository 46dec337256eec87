"""The judge of the demo world: how well an image shows its caption, and how well it is made.

`score` is differentiable and written in jax.numpy, so that it can label pairs, rank candidates of one denoising step
and guide by its gradient. It knows the world's palette and shapes, but nothing of how an image was made: an object is
looked for everywhere in the image by matching templates, so a jittered or displaced object is still found. One at the
wrong place counts half, one of the right colour but of another shape or size somewhat less.

    faithfulness  = 0.8 * mean over objects of (found * (1 + place) / 2) + 0.2 * background
    aesthetics    = mean of edges, contrast, cleanness and composition
    score         = 0.6 * faithfulness + 0.4 * aesthetics

Every term lies in [0, 1].
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.shapes import Array
from flax_pref.world import scenes as world

_COLOURS, _BACKGROUNDS = np.array(list(world.COLOURS.values())), np.array(list(world.BACKGROUNDS.values()))
_SHAPES: list[str] = list(world.SHAPES)
_SIZES, _PLACES = list(world.SIZES), list(world.PLACES)


class Question(NamedTuple):
    """What the captions of a batch say, as arrays; a scene with one object has `present[:, 1] == 0`."""

    present: Array  # [B, 2]
    colour: Array  # [B, 2, 3]
    template: Array  # [B, 2] index of the right one among all (size, shape) templates
    centre: Array  # [B, 2, 2] nominal (x, y), pixels
    background: Array  # [B, 3]


def question(captions: Sequence[str]) -> Question:
    """Reads captions of the demo world (see `world.parse`, which raises ValueError on any other)."""
    rows = []
    for scene in map(world.parse, captions):
        # The absent second object repeats the first, so that no array depends on the number of objects.
        objects, centres = ((scene.objects * 2)[:2], (world.PLACES[scene.place] * 2)[:2])
        rows.append(
            (
                np.array([1.0, len(scene.objects) - 1.0]),
                np.array([world.COLOURS[o.colour] for o in objects]),
                np.array([_SIZES.index(o.size) * len(_SHAPES) + _SHAPES.index(o.shape) for o in objects]),
                np.array(centres),
                np.array(world.BACKGROUNDS[scene.background]),
            )
        )
    columns = [np.stack(column) for column in zip(*rows, strict=True)]
    return Question(*(c.astype(np.int32 if c.dtype.kind == "i" else np.float32) for c in columns))


_PARTIAL = 0.3  # what an object of the right colour counts if its shape or size is wrong


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Coverage of every (size, shape) and of its neighbourhood, `[10, 64, 64]`, centred at the pixel corner (0, 0)."""
    axis = (np.arange(world.RESOLUTION) + 0.5 + world.RESOLUTION / 2) % world.RESOLUTION - world.RESOLUTION / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    shapes = [world.coverage(shape, radius, x, y) for radius in world.SIZES.values() for shape in _SHAPES]
    around = [world.coverage("circle", 1.7 * r, x, y) for r in world.SIZES.values() for _ in _SHAPES]
    return np.stack(shapes).astype(np.float32), np.stack(around).astype(np.float32)


def _membership(image, colour, width):
    """How much each pixel has a colour: exp(-d^2 / (2 width^2)), `[64, 64]`."""
    return jnp.exp(-jnp.square(image - colour).sum(-1) / (2 * width**2))


def _correlate(image, templates):
    """Circular cross-correlation of `[64, 64]` with `[K, 64, 64]`."""
    return jnp.fft.irfft2(jnp.fft.rfft2(image) * jnp.conj(jnp.fft.rfft2(templates)), s=image.shape)


def _find(image, colour, template):
    """Looks for one object everywhere.

    Returns:
      (found in [0, 1], its centre (x, y) in pixels).
    """
    shapes, around = _templates()
    member = _membership(image, colour, 0.18)
    inside = _correlate(member, shapes)
    # Intersection over union of the pixels of this colour nearby and the template, for every place and template.
    overlap = inside / (shapes.sum((1, 2))[:, None, None] + jnp.maximum(_correlate(member, around), inside) - inside)
    match = overlap[template].ravel()
    where = jax.nn.softmax(60.0 * match)
    corner = jnp.arange(world.RESOLUTION, dtype=jnp.float32)
    grid = jnp.stack(jnp.meshgrid(corner, corner), -1).reshape(-1, 2)
    # A square is also half a circle: count the match only where no other template matches better.
    best = jax.nn.logsumexp(60.0 * overlap.reshape(len(shapes), -1), axis=1) / 60.0
    right = jax.nn.softmax(40.0 * best)[template]
    found = _PARTIAL * jnp.clip(best.max() / 0.9, 0, 1) + (1 - _PARTIAL) * jnp.clip(where @ match / 0.9, 0, 1) * right
    return found, where @ grid


def _beyond(distance, tolerance, width):
    """1 within the tolerance, falling off as a Gaussian outside."""
    return jnp.exp(-jnp.square(jnp.maximum(distance - tolerance, 0) / width) / 2)


def _judge(image, ask: Question):
    present = ask.present / ask.present.sum()
    found, centre = jax.vmap(lambda colour, template: _find(image, colour, template))(ask.colour, ask.template)

    # Place: on the right side of the image, and of the other object.
    side = ask.centre - world.RESOLUTION / 2
    off = jnp.abs(centre - ask.centre)
    place = _beyond(jnp.where(side == 0, 0.6 * off, off).max(-1), 5.0, 5.0)
    member = jax.vmap(lambda colour: _membership(image, colour, 0.2))(
        jnp.concatenate([ask.colour, ask.background[None]])
    )
    background = jnp.clip(member[-1].sum() / (1 - member[:2].max(0)).sum(), 0, 1)
    faithfulness = 0.8 * (present * found * (1 + place) / 2).sum() + 0.2 * background

    # Edges: sum |g|^2 / sum |g| is the height of the steps between neighbours; half of the nominal one, an
    # edge two pixels wide, counts as sharp.
    padded = jnp.pad(image, ((0, 1), (0, 1), (0, 0)), mode="edge")
    gradient = jnp.stack([padded[1:, :-1] - image, padded[:-1, 1:] - image])
    size = jnp.sqrt(jnp.square(gradient).sum((0, -1)) + 1e-8)
    step = jnp.sqrt(jnp.square(ask.colour - ask.background).sum(-1))
    edges = jnp.clip(jnp.square(size).sum() / size.sum() / (0.5 * present @ step), 0, 1)
    # Cleanness: outside the few pixels of an outline, neighbours are equal and nothing has a colour of its own.
    smooth = jnp.clip((jnp.exp(-jnp.square(size / 0.06)).mean() - 0.4) / 0.5, 0, 1)
    stray = 1 - member.max(0).mean()
    cleanness = smooth * _beyond(stray, 0.02, 0.02)
    # Contrast: what has the object's colour differs from the rest as much as the palette allows.
    weight = jax.vmap(lambda colour: jax.nn.softmax(-20 * jnp.square(image - colour).sum(-1).ravel()))(ask.colour)
    mean = image.reshape(-1, 3).mean(0)
    stands_off = jnp.sqrt(jnp.square(weight @ image.reshape(-1, 3) - mean).sum(-1) + 1e-8)
    contrast = jnp.clip(present @ (stands_off / (0.8 * step)), 0, 1)
    # Composition: close to the nominal place, that is balanced and clear of the border.
    composition = present @ (found * _beyond(jnp.sqrt(jnp.square(centre - ask.centre).sum(-1) + 1e-8), 2.0, 4.0))
    aesthetics = (edges + cleanness + contrast + composition) / 4
    return {
        "score": 0.6 * faithfulness + 0.4 * aesthetics,
        "faithfulness": faithfulness,
        "aesthetics": aesthetics,
        "found": present @ found,
        "place": present @ place,
        "background": background,
        "edges": edges,
        "cleanness": cleanness,
        "contrast": contrast,
        "composition": composition,
    }


def judge(images: Array, asked: Question) -> dict[str, jax.Array]:
    """Every term of the score.

    Args:
      images: `[B, 64, 64, 3]` in [0, 1].
      asked: of the same batch, from `question`.

    Returns:
      name -> `[B]`, each in [0, 1].
    """
    return jax.vmap(_judge)(images.astype(jnp.float32), asked)


def score(images: Array, asked: Question) -> jax.Array:
    """The score alone, `[B]`, differentiable in the images; see `judge`."""
    return judge(images, asked)["score"]
