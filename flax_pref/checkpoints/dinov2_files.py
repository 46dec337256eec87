"""DINOv2 as its users have it: files of its authors, folders of transformers, repositories of the Hub."""

import dataclasses
import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from flax_pref.checkpoints.clip_files import OpenClipTensors
from flax_pref.checkpoints.hub import find_files
from flax_pref.checkpoints.weights import COMPONENTS, abstract_network, fill, load_network, open_tensors
from flax_pref.models.dinov2 import HEAD_SIZE, DINOv2Config
from flax_pref.models.network import Network

PUBLISHED = "facebook/dinov2-base"
EXPECTED = f"expected weights of DINOv2, such as dinov2_vitb14_pretrain.pth or the folder {PUBLISHED} of the Hub"
NAMES = ((r"\.attn\.qkv\.(weight|bias)\[q\]$", r".attn.query.\1"), (r"\.attn\.qkv\.(weight|bias)\[k\]$",
         r".attn.key.\1"), (r"\.attn\.qkv\.(weight|bias)\[v\]$", r".attn.value.\1"))  # fmt: skip
AUTHORS = dataclasses.replace(
    COMPONENTS["dinov2"], old_names=NAMES, ignored=r"^mask_token$", described_by="the rest of the file"
)
OFFSET = 0.1  # that the authors add to the number of positions, of networks without registers


class DINOv2Tensors(OpenClipTensors):
    """`Tensors` of a file of the authors with q, k and v apart."""

    packed = re.compile(r"\.attn\.qkv\.(weight|bias)$")
    transposed = re.compile(r"$^")


def _open(file: Path) -> DINOv2Tensors:
    return DINOv2Tensors(open_tensors(file))


def load_dinov2(path: str | Path | None = None, *, size: int, dtype=jnp.float32) -> Network:
    """Reads a DINOv2 network for images of one size; its module is `models.dinov2.DINOv2`.

    Its positions are resampled where they are stored for another size (518 pixels in the published weights), as the
    library that the file is from does it: the authors' code stretches by 0.1 of a position more than transformers.

    Args:
        path: `.pth` file of the authors, a safetensors file with the same names, a folder of transformers, or the id of
            a Hub repository with the same; None: the base network, as published on the Hub.
        size: of the images that it will see, in pixels.
        dtype: what it computes in and keeps its weights in.

    Raises:
        FileNotFoundError: there is nothing at this path, or a file is missing.
        ValueError: a config field or a weight is not what the network needs, or a file is damaged.
    """
    place = find_dinov2(path)
    if place.is_file():
        network, offset = _load_authors(place, dtype), OFFSET
    else:
        network, offset = load_network("dinov2", place, dtype), 0.0
    if network.config.registers:
        offset = 0.0
    positions = np.asarray(network.params["pos_embed"], np.float64)
    grid = network.config.image_size // network.config.patch_size
    wanted = size // network.config.patch_size
    if wanted != grid:
        axis = resampling(grid, wanted, offset=offset, antialias=bool(network.config.registers))
        patches = np.einsum("ai,bj,ijd->abd", axis, axis, positions[0, 1:].reshape(grid, grid, -1), optimize=True)
        positions = np.concatenate([positions[:, :1], patches.reshape(1, wanted**2, -1)], axis=1)
    params = {**network.params, "pos_embed": jnp.asarray(positions, dtype)}
    return network._replace(config=dataclasses.replace(network.config, image_size=size), params=params)


def find_dinov2(path_or_id: str | Path | None) -> Path:
    """Where a DINOv2 network lies: a file, a folder of transformers, or the downloaded repository of the Hub.

    Raises:
        FileNotFoundError: it is none of these, or it can be neither reached nor found in the cache.
    """
    place = find_files(
        PUBLISHED if path_or_id is None else path_or_id,
        ["config.json", "model*.safetensors", "model.safetensors.index.json"],
    )
    if place.is_dir() and not (place / "config.json").is_file():
        raise FileNotFoundError(f"{place}: no config.json; {EXPECTED}")
    return place


def resampling(count: int, wanted: int, *, offset: float, antialias: bool) -> np.ndarray:
    """Weights `[wanted, count]` of bicubic resampling as `torch.nn.functional.interpolate` does it, in float64.

    Args:
        count: of positions along an axis.
        wanted: of them.
        offset: added to `wanted` in the ratio of both, as the authors do.
        antialias: as torch's flag; its cubic kernel is another one then.
    """
    ratio = count / (wanted + offset)
    centres = (np.arange(wanted) + 0.5) * ratio
    weights = np.zeros((wanted, count))
    for row, centre in enumerate(centres):
        if antialias:
            width = max(ratio, 1.0)
            taps = np.arange(max(int(centre - 2 * width + 0.5), 0), min(int(centre + 2 * width + 0.5), count))
            values = _cubic((taps + 0.5 - centre) / width, -0.5)
            values /= values.sum()
        else:
            taps = math.floor(centre - 0.5) + np.arange(-1, 3)
            values = _cubic(taps + 0.5 - centre, -0.75)
        np.add.at(weights[row], np.clip(taps, 0, count - 1), values)
    return weights


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys, 1981), zero from |x| = 2 on."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _load_authors(file: Path, dtype) -> Network:
    with _open(file) as tensors:
        names = list(tensors.keys())
        shapes = {name: tuple(tensors.get_slice(name.partition("[")[0]).get_shape()) for name in names}
    try:
        network = abstract_network("dinov2", _config(shapes), dtype)
    except (ArithmeticError, ValueError) as error:
        raise ValueError(f"{file}: {error}; {EXPECTED}") from error
    fill(network.params, AUTHORS, dict.fromkeys(names, file), file, open_file=_open)
    return network


def _config(shapes: dict[str, tuple[int, ...]]) -> DINOv2Config:
    """Sizes from the shapes of weights."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if len(found := shapes.get(name, ())) != axes:
            raise ValueError(f"no weight {name!r} with {axes} axes")
        return found

    width, _, _, patch = shape("patch_embed.proj.weight", 4)
    grid = math.isqrt(max(shape("pos_embed", 3)[1] - 1, 0))
    gated = "blocks.0.mlp.w12.weight" in shapes
    within = shape("blocks.0.mlp.w12.weight", 2)[0] // 2 if gated else shape("blocks.0.mlp.fc1.weight", 2)[0]
    return DINOv2Config(
        hidden_size=width,
        num_hidden_layers=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        num_attention_heads=max(1, width // HEAD_SIZE),
        image_size=grid * patch,
        patch_size=patch,
        mlp_width=within,
        use_swiglu_ffn=gated,
        registers=shape("register_tokens", 3)[1] if "register_tokens" in shapes else 0,
    )
