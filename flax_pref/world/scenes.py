"""The demo world: captioned scenes of one or two coloured shapes, drawn at 64 x 64 pixels.

A `Scene` is what a caption says; `render` draws it (positions jitter a little, as the caption does not fix them), and
`corrupt` does to a drawing what the web does to images: blur, grain, faded colours, stray marks. `training_example` is
one draw from the mixture of good and bad images that the base model learns from.

Prompts come in three splits. `train` and `validation` are disjoint captions over the same colour-shape combinations;
every caption of `held_out` contains at least one combination (`HELD_OUT`) that no training image shows.
"""

import functools
import operator
import zlib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

RESOLUTION = 64

COLOURS = {
    "red": (0.86, 0.15, 0.15),
    "green": (0.16, 0.64, 0.27),
    "blue": (0.16, 0.35, 0.86),
    "yellow": (0.96, 0.80, 0.10),
    "purple": (0.55, 0.22, 0.72),
    "orange": (0.96, 0.50, 0.12),
}
BACKGROUNDS = {
    "white": (0.97, 0.97, 0.97),
    "black": (0.06, 0.06, 0.08),
    "grey": (0.60, 0.61, 0.63),
    "pink": (0.98, 0.78, 0.84),
}
SIZES = {"small": 7.0, "large": 11.5}  # radius in pixels of the disc that has the object's area
SHAPES = ("circle", "square", "triangle", "diamond", "cross")

# Centre of each object in pixels (x, y); a relation places two objects, a position one.
POSITIONS = {
    "in the middle": ((32.0, 32.0),),
    "on the left": ((17.0, 32.0),),
    "on the right": ((47.0, 32.0),),
    "at the top": ((32.0, 17.0),),
    "at the bottom": ((32.0, 47.0),),
}
RELATIONS = {
    "left of": ((17.0, 32.0), (47.0, 32.0)),
    "right of": ((47.0, 32.0), (17.0, 32.0)),
    "above": ((32.0, 17.0), (32.0, 47.0)),
    "below": ((32.0, 47.0), (32.0, 17.0)),
}
PLACES = POSITIONS | RELATIONS
JITTER = 2.0  # pixels

# Never shown in training: every colour once, every shape at least once.
HELD_OUT = frozenset(
    {
        ("red", "triangle"),
        ("green", "square"),
        ("blue", "cross"),
        ("yellow", "circle"),
        ("purple", "diamond"),
        ("orange", "square"),
    }
)

Split = Literal["train", "validation", "held_out"]


class Object(NamedTuple):
    """One coloured shape."""

    size: str
    colour: str
    shape: str


class Scene(NamedTuple):
    """What a caption says: one object and its position, or two objects and their relation, on a background."""

    objects: tuple[Object, ...]
    place: str
    background: str

    @property
    def caption(self) -> str:
        """The scene in English, for instance "a small red circle above a large blue square, white background"."""
        first, *rest = (f"a {o.size} {o.colour} {o.shape}" for o in self.objects)
        return " ".join((first, self.place, *rest)) + f", {self.background} background"

    @property
    def split(self) -> Split:
        """The split that this caption belongs to; a function of the caption alone."""
        if any((o.colour, o.shape) in HELD_OUT for o in self.objects):
            return "held_out"
        return "validation" if zlib.crc32(self.caption.encode()) % 10 == 0 else "train"


def parse(caption: str) -> Scene:
    """The inverse of `Scene.caption`.

    Raises:
      ValueError: if the caption is not one of this world's.
    """
    text, _, background = caption.removesuffix(" background").rpartition(", ")
    for place in PLACES:
        first, found, second = text.partition(f" {place}")
        if not found:
            continue
        objects = tuple(Object(*words.split()[1:]) for words in (first, second.strip()) if len(words.split()) == 4)
        scene = Scene(objects, place, background)
        known = all(o.size in SIZES and o.colour in COLOURS and o.shape in SHAPES for o in objects)
        if known and background in BACKGROUNDS and len(objects) == len(PLACES[place]) and scene.caption == caption:
            return scene
    raise ValueError(f"not a caption of the demo world: {caption!r}; expected for instance {example().caption!r}")


def example() -> Scene:
    """A scene for messages and figures."""
    return Scene((Object("small", "red", "circle"), Object("large", "blue", "square")), "above", "white")


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene drawn at random over all splits: one object in one of three cases, two of different colours else."""
    relation = rng.random() < 2 / 3
    colours = rng.permutation(list(COLOURS))
    objects = tuple(
        Object(str(rng.choice(list(SIZES))), str(colours[k]), str(rng.choice(SHAPES))) for k in range(1 + relation)
    )
    place = str(rng.choice(list(RELATIONS if relation else POSITIONS)))
    return Scene(objects, place, str(rng.choice(list(BACKGROUNDS))))


def scenes(split: Split, seed: int) -> Iterator[Scene]:
    """An endless stream of distinct scenes of one split."""
    rng = np.random.default_rng([zlib.crc32(split.encode()), seed])
    seen = set()
    while True:
        scene = random_scene(rng)
        if scene.split == split and scene not in seen:
            seen.add(scene)
            yield scene


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def coverage(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of each pixel that a shape at the origin covers, from its signed distance.

    Args:
      shape: one of `SHAPES`.
      radius: of the disc of equal area, in pixels, so that area tells the size and not the shape.
      x: pixel coordinates relative to the shape's centre; y points down.
      y: as x.
    """
    ax, ay = np.abs(x), np.abs(y)
    area = np.pi * radius**2
    match shape:
        case "circle":
            distance = np.hypot(x, y) - radius
        case "square":
            distance = np.maximum(ax, ay) - np.sqrt(area) / 2
        case "diamond":
            distance = (ax + ay - np.sqrt(area / 2)) / np.sqrt(2)
        case "triangle":  # equilateral, centroid at the origin, pointing up
            inradius = np.sqrt(area / (3 * np.sqrt(3)))
            distance = np.maximum(y, (np.sqrt(3) * ax - y) / 2) - inradius
        case "cross":  # five equal squares
            half = np.sqrt(area / 5) / 2
            distance = np.minimum(np.maximum(ax - half, ay - 3 * half), np.maximum(ax - 3 * half, ay - half))
        case _:
            raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0, 1)


def render(scene: Scene, rng: np.random.Generator | None = None) -> np.ndarray:
    """Draws a scene cleanly.

    Args:
      scene: what to draw.
      rng: jitters the positions; None puts every object at its nominal centre.

    Returns:
      float32 `[64, 64, 3]` in [0, 1].
    """
    y, x = np.mgrid[:RESOLUTION, :RESOLUTION] + 0.5
    image = np.full((RESOLUTION, RESOLUTION, 3), BACKGROUNDS[scene.background])
    for thing, (cx, cy) in zip(scene.objects, PLACES[scene.place], strict=True):
        dx, dy = rng.uniform(-JITTER, JITTER, 2) if rng is not None else (0.0, 0.0)
        mask = coverage(thing.shape, SIZES[thing.size], x - cx - dx, y - cy - dy)[..., None]
        image = mask * COLOURS[thing.colour] + (1 - mask) * image
    return image.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# The faults of web data


def _blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    sigma = rng.uniform(1.0, 2.2)
    offsets = np.arange(-6, 7)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(image, [(6, 6) if a == axis else (0, 0) for a in range(3)], mode="edge")
        shifted = (w * np.take(padded, np.arange(RESOLUTION) + i, axis) for i, w in enumerate(kernel))
        image = functools.reduce(operator.add, shifted)
    return image


def _grain(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    coarse = rng.normal(size=(RESOLUTION // 4, RESOLUTION // 4, 3))
    return image + rng.uniform(0.05, 0.12) * np.kron(coarse, np.ones((4, 4, 1)))


def _fade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 0.6 + rng.uniform(0.45, 0.75) * (image - 0.6)


def _stray_marks(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:RESOLUTION, :RESOLUTION] + 0.5
    for _ in range(rng.integers(2, 6)):
        cx, cy = rng.uniform(2, RESOLUTION - 2, 2)
        angle, length, width = rng.uniform(0, np.pi), rng.uniform(1, 8), rng.uniform(1, 2)
        along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        across = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        mask = np.clip(0.5 + width - np.hypot(along - np.clip(along, -length, length), across), 0, 1)[..., None]
        image = mask * rng.uniform(0, 1, 3) + (1 - mask) * image
    return image


FAULTS = (_blur, _grain, _fade, _stray_marks)


def corrupt(image: np.ndarray, rng: np.random.Generator, count: int | None = None) -> np.ndarray:
    """Some of blur, grain, faded colours and stray marks.

    Args:
      image: `[64, 64, 3]` in [0, 1].
      rng: chooses the faults and their strength.
      count: how many faults; None: one or two.
    """
    for k in sorted(rng.permutation(len(FAULTS))[: rng.integers(1, 3) if count is None else count]):
        image = FAULTS[k](image, rng)
    return np.clip(image, 0, 1).astype(np.float32)


def miscaption(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with one attribute told wrong (one that keeps the caption in the training split)."""
    while True:
        other = random_scene(rng)
        match rng.integers(3):
            case 0:
                wrong = scene._replace(background=other.background)
            case 1 if len(other.objects) == len(scene.objects):
                wrong = scene._replace(place=other.place)
            case _:
                wrong = scene._replace(objects=(other.objects[0], *scene.objects[1:]))
        if wrong != scene and wrong.split == "train" and len({o.colour for o in wrong.objects}) == len(wrong.objects):
            return wrong


# What draws the images of pairs, as several models do for a published set: cleanly, with few or many faults, or with
# one attribute of the caption wrong.
GENERATORS: dict[str, Callable[[Scene, np.random.Generator], np.ndarray]] = {
    "clean": render,
    "faulty": lambda scene, rng: corrupt(render(scene, rng), rng, 1),
    "worn": lambda scene, rng: corrupt(render(scene, rng), rng, 3),
    "wrong": lambda scene, rng: render(miscaption(scene, rng), rng),
}


def training_example(rng: np.random.Generator, *, clean: float = 0.4, miscaptioned: float = 0.1):
    """One captioned image of mixed quality from the training split.

    Args:
      rng: draws everything.
      clean: share of images without a fault.
      miscaptioned: share of captions that tell one attribute wrong.

    Returns:
      (image float32 `[64, 64, 3]` in [0, 1], caption).
    """
    while (scene := random_scene(rng)).split != "train":
        pass
    image = render(scene, rng)
    if rng.random() >= clean:
        image = corrupt(image, rng)
    return image, (miscaption(scene, rng) if rng.random() < miscaptioned else scene).caption
