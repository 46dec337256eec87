"""Networks that turn an image into features, by their names: what diversity and distances to photographs come from."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_pref.checkpoints import inception_files, lpips_files
from flax_pref.checkpoints.clip_files import find_clip, load_clip_vision
from flax_pref.checkpoints.dinov2_files import load_dinov2
from flax_pref.checkpoints.inception_files import load_inception
from flax_pref.checkpoints.lpips_files import load_lpips
from flax_pref.models.inception import SIZE
from flax_pref.rewards.aesthetic import load_aesthetic_reward
from flax_pref.rewards.clip import load_clip_reward, normalised
from flax_pref.rewards.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPENAI_MEAN,
    OPENAI_STD,
    cropped_view,
    resize,
    resize_as_tensorflow,
    square_view,
)
from flax_pref.shapes import Array, Float, Pixels, Squares, Tree

CMMD = "openai/clip-vit-large-patch14-336"
DINOV2_SIZE, DINOV2_SHORTEST = 224, 256  # pixels: of the square, and of the shortest side before the crop


class Features(Protocol):
    """A network that turns an image into a vector; a pytree of its weights. A `Reward` with a CLIP is one too."""

    @property
    def name(self) -> str:
        """One of `FEATURES`."""
        ...

    def view(self, images: Pixels) -> Squares:
        """Images as the network takes them; can be jitted."""
        ...

    def image_features(self, view: Squares) -> Float[jax.Array, "images features"]:
        """A vector for each image, in float32; can be jitted."""
        ...


class Distance(Protocol):
    """How different the images of a pair look; a pytree of its weights."""

    @property
    def name(self) -> str:
        """One of `DISTANCES`."""
        ...

    def view(self, images: Float[Array, "pairs 2 height width 3"]) -> Tree:
        """Pairs of images in [0, 1] as the network takes them; can be jitted."""
        ...

    def distance(self, view: Tree) -> Float[jax.Array, " pairs"]:
        """A number for each pair, in float32; can be jitted."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LPIPSDistance:
    """LPIPS; see `Distance`.

    Attributes:
        params: of the network.
        graphdef: of the network, a `models.lpips.LPIPS`.
    """

    params: dict
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})

    name = "lpips"

    def view(self, images: Float[Array, "pairs 2 height width 3"]) -> Float[Array, "pairs 2 height width 3"]:
        """The images as they are: LPIPS compares them in their own size."""
        return images

    def distance(self, view: Float[Array, "pairs 2 height width 3"]) -> Float[jax.Array, " pairs"]:
        """See `Distance`."""
        return nnx.merge(self.graphdef, self.params)(view)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NetworkFeatures:
    """Features by a network that takes squares; see `Features`.

    Attributes:
        params: of the network.
        name: one of `FEATURES`.
        graphdef: of the network.
        image_size: what it sees of an image, in pixels.
    """

    params: dict
    name: str = dataclasses.field(metadata={"static": True})
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    image_size: int = dataclasses.field(metadata={"static": True})

    def view(self, images: Pixels) -> Squares:
        """See `Features`; the size is `image_size`."""
        return VIEWS[self.name](images, self.image_size)

    def image_features(self, view: Squares) -> Float[jax.Array, "images features"]:
        """See `Features`; those of CLIP have length 1."""
        network = nnx.merge(self.graphdef, self.params)
        return normalised(network.encode_images(view)) if self.name == "cmmd" else network(view)


def _tensorflow_view(images: Pixels, size: int) -> Squares:
    """As the graph that FID was defined with: `(levels - 128) / 128` after its own bilinear resizing."""
    return (resize_as_tensorflow(images * np.float32(255), (size, size)) - 128) / 128


def _clean_view(images: Pixels, size: int) -> Squares:
    """As clean-fid (arXiv:2104.11222): bicubic with antialiasing, neither rounded nor cropped."""
    return (jnp.clip(resize(images, (size, size), in_levels=False), 0, 1) * 255 - 128) / 128


VIEWS: dict[str, Callable[[Pixels, int], Squares]] = {
    "inception": _tensorflow_view,
    "inception-clean": _clean_view,
    "dinov2": lambda images, size: square_view(images, size, IMAGENET_MEAN, IMAGENET_STD, shortest=DINOV2_SHORTEST),
    "cmmd": lambda images, size: cropped_view(images, size, OPENAI_MEAN, OPENAI_STD),
}


class FeatureFiles(NamedTuple):
    """FeatureFiles of a network; see `load_features`."""

    path: str | None
    clip: str | None
    tokenizer: str | None
    dtype: Any


def _inception(name: str, files: FeatureFiles) -> Features:
    network = load_inception(files.path, dtype=files.dtype)
    return NetworkFeatures(network.params, name, network.graphdef, SIZE)


def _dinov2(name: str, files: FeatureFiles) -> Features:
    network = load_dinov2(files.path, size=DINOV2_SIZE, dtype=files.dtype)
    return NetworkFeatures(network.params, name, network.graphdef, DINOV2_SIZE)


def _cmmd(name: str, files: FeatureFiles) -> Features:
    place = find_clip(CMMD if files.path is None else files.path)
    network = load_clip_vision(place, hidden_act="quick_gelu", dtype=files.dtype)
    return NetworkFeatures(network.params, name, network.graphdef, network.config.vision_config.image_size)


def _clip(name: str, files: FeatureFiles) -> Features:
    return load_clip_reward(name, files.path, tokenizer=files.tokenizer, dtype=files.dtype)


FEATURES: dict[str, Callable[[str, FeatureFiles], Features]] = {
    "clip": _clip,
    "pickscore": _clip,
    "hpsv2": _clip,
    "hpsv2.1": _clip,
    "aesthetic": lambda name, files: load_aesthetic_reward(files.path, files.clip, dtype=files.dtype),
    "cmmd": _cmmd,
    "dinov2": _dinov2,
    "inception": _inception,
    "inception-clean": _inception,
}


def _lpips(name: str, files: FeatureFiles) -> Distance:
    network = load_lpips(files.path, dtype=files.dtype)
    return LPIPSDistance(network.params, network.graphdef)


DISTANCES: dict[str, Callable[[str, FeatureFiles], Distance]] = {"lpips": _lpips}


# Networks that are not loaded as published, and what is expected for each.
PATH_NEEDED = {
    **dict.fromkeys(("inception", "inception-clean"), inception_files.EXPECTED),
    "lpips": lpips_files.EXPECTED,
}


def load_features(
    name: str,
    path: str | None = None,
    *,
    clip: str | None = None,
    tokenizer: str | None = None,
    dtype: Any = jnp.float32,
) -> Features:
    """A network by its name.

    Args:
        name: one of `FEATURES`.
        path: file, folder or Hub id of its weights; None: as published on the Hub, for those that are.
        clip: of "aesthetic", as `rewards.reward.Weighted` has it.
        tokenizer: of a CLIP reward, as `rewards.reward.Weighted` has it.
        dtype: what it computes in and keeps its weights in.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is no network of this name, or a file is not what it should be.

    Example:
        >>> from flax_pref.rewards.features import FEATURES
        >>> sorted(FEATURES)[:3]
        ['aesthetic', 'clip', 'cmmd']
    """
    if name not in FEATURES:
        raise ValueError(f"features: no network {name!r}; expected one of {', '.join(FEATURES)}")
    if path is None and name in PATH_NEEDED:
        raise FileNotFoundError(f"features: {name} needs the path of its weights; {PATH_NEEDED[name]}")
    return FEATURES[name](name, FeatureFiles(path, clip, tokenizer, dtype))


def load_distance(name: str, path: str | None = None, *, dtype: Any = jnp.float32) -> Distance:
    """A distance by its name; arguments and errors as in `load_features`, and the names are those of `DISTANCES`."""
    if name not in DISTANCES:
        raise ValueError(f"features: no distance {name!r}; expected one of {', '.join(DISTANCES)}")
    if path is None and name in PATH_NEEDED:
        raise FileNotFoundError(f"features: {name} needs the path of its weights; {PATH_NEEDED[name]}")
    return DISTANCES[name](name, FeatureFiles(path, None, None, dtype))
