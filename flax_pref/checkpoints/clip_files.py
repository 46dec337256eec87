"""CLIP as its users have it: folders of transformers, files of OpenCLIP, repositories of the Hub."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from flax_pref.checkpoints.hub import find_files
from flax_pref.checkpoints.weights import (
    COMPONENTS,
    Placement,
    Tensors,
    abstract_network,
    fill,
    load_network,
    open_tensors,
)
from flax_pref.models.clip import CLIPTextConfig
from flax_pref.models.clip_vision import CLIPConfig, CLIPVisionConfig
from flax_pref.models.network import Network

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def load_clip(
    path: str | Path, *, hidden_act: str = "gelu", dtype=jnp.float32, place: Placement | None = None
) -> Network:
    """Reads a CLIP model; its module is `models.clip_vision.CLIPModel`.

    Args:
        path: folder of transformers (config.json and safetensors or torch files), the id of a Hub repository with the
            same, or a file of OpenCLIP (`.pt`, `.bin`, `.safetensors`).
        hidden_act: of an OpenCLIP file, which does not say: "gelu", or "quick_gelu" for weights that OpenAI trained.
        dtype: what it computes in and keeps its weights in.
        place: says where each weight goes; None: the default device.

    Raises:
        FileNotFoundError: there is nothing at this path, or a file is missing.
        ValueError: a config field or a weight is not what the network needs, or a file is damaged.
    """
    return _load("clip", path, hidden_act, dtype, place)


def load_clip_vision(
    path: str | Path, *, hidden_act: str = "gelu", dtype=jnp.float32, place: Placement | None = None
) -> Network:
    """Reads the image encoder of a CLIP model, a `CLIPVisionModel`; arguments and errors as in `load_clip`."""
    return _load("clip_vision", path, hidden_act, dtype, place)


def _load(kind: str, path: str | Path, hidden_act: str, dtype, place: Placement | None) -> Network:
    path = find_clip(path)
    if path.is_file():
        return _load_openclip(kind, path, hidden_act, dtype, place)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: no config.json; expected a CLIP folder of transformers, or the path of an OpenCLIP file"
        )
    return load_network(kind, path, dtype, place=place)


# ----------------------------------------------------------------------------------------------------------------------
# The Hub


def find_clip(path_or_id: str | Path) -> Path:
    """Where a CLIP model lies: the path, where there is something, else the downloaded repository of the Hub.

    Raises:
        FileNotFoundError: it is neither, or it can be neither reached nor found in the cache.
    """
    settings = ["config.json", *TOKENIZER_FILES]
    folder = find_files(path_or_id, [*settings, "model*.safetensors", "model.safetensors.index.json"])
    if folder.is_dir() and not list(folder.glob("model*.safetensors")):
        # Only where there is nothing else: the same weights again, in the order of gigabytes.
        folder = find_files(path_or_id, [*settings, "pytorch_model*.bin", "pytorch_model.bin.index.json"])
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# OpenCLIP

OPENCLIP_NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.weight$", "vision_model.embeddings.patch_embedding.weight"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^(text\.)?token_embedding\.weight$", "text_model.embeddings.token_embedding.weight"),
    (r"^(text\.)?positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^(text\.)?transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^(text\.)?ln_final\.", "text_model.final_layer_norm."),
    (r"^(text\.)?text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.in_proj_(weight|bias)\[([qkv])\]$", r".self_attn.\2_proj.\1"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
OPENCLIP = {
    kind: dataclasses.replace(
        COMPONENTS[kind], old_names=OPENCLIP_NAMES, ignored=ignored, described_by="the rest of the file"
    )
    for kind, ignored in {
        "clip": r"(^|\.)attn_mask$|^(input_resolution|context_length|vocab_size)$",
        "clip_vision": r"^(?!visual\.)",
    }.items()
}
PARTS = "qkv"
# Width of an attention head by the width of the vision transformer, in OpenCLIP's configs; that of texts is always 64.
HEAD_WIDTHS = dict.fromkeys((384, 512, 768, 896, 1024), 64) | {1280: 80, 1408: 88, 1664: 104, 1792: 112}
TEXT_HEAD_WIDTH = 64


class OpenClipTensors:
    """`Tensors` of an OpenCLIP file as linear layers have them: q, k and v apart, projections `[out, in]`.

    The parts of `NAME` are called `NAME[q]`, `NAME[k]` and `NAME[v]`.

    Attributes:
        packed: pattern of names that hold q, k and v.
        transposed: pattern of names that are stored `[in, out]`.
    """

    packed = re.compile(r"\.in_proj_(weight|bias)$")
    transposed = re.compile(r"(^|\.)(visual\.proj|text_projection)$")

    def __init__(self, tensors: Tensors):
        names = list(tensors.keys())
        # The module that trains on several devices puts this before every name.
        self._prefix = "module." if names and all(name.startswith("module.") for name in names) else ""
        self._names = [name.removeprefix(self._prefix) for name in names]
        self._tensors = tensors

    def __enter__(self) -> Self:
        self._tensors.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._tensors.__exit__(*error)

    def keys(self) -> Iterable[str]:
        """The names of the weights."""
        return [part for name in self._names for part in self.parts(name)]

    def get_slice(self, name: str) -> Any:
        """The whole weight of this name, not read yet."""
        return self._tensors.get_slice(self._prefix + name)

    @classmethod
    def parts(cls, name: str) -> Iterator[str]:
        """The names of the parts of a weight."""
        return (f"{name}[{part}]" for part in PARTS) if cls.packed.search(name) else iter((name,))

    def get_tensor(self, name: str) -> np.ndarray:
        """The weight of this name."""
        whole, part = (name[:-3], name[-2]) if name.endswith("]") else (name, None)
        array = self._tensors.get_tensor(self._prefix + whole)
        if part is not None:
            return np.split(array, len(PARTS))[PARTS.index(part)]
        return array.T if self.transposed.search(name) else array


def _open_openclip(file: Path) -> OpenClipTensors:
    return OpenClipTensors(open_tensors(file))


def _load_openclip(kind: str, file: Path, hidden_act: str, dtype, place: Placement | None) -> Network:
    with _open_openclip(file) as tensors:
        names = tensors.keys()
        try:
            config = _config(tensors, hidden_act)
        except (LookupError, ValueError) as error:
            raise ValueError(f"{file}: {error}; expected a CLIP of OpenCLIP with a vision transformer") from error
    network = abstract_network(kind, config, dtype)
    fill(network.params, OPENCLIP[kind], dict.fromkeys(names, file), file, place, open_file=_open_openclip)
    return network


def _config(tensors: OpenClipTensors, hidden_act: str) -> CLIPConfig:
    """The config of a network from the shapes of its weights."""
    names = set(tensors.keys())
    text = "text." if "text.token_embedding.weight" in names else ""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in names:
            raise LookupError(f"no weight {name!r}")
        shape = tensors.get_tensor(name).shape
        if len(shape) != axes:
            raise ValueError(f"weight {name!r} has shape {list(shape)}, expected {axes} axes")
        return shape

    def layers(prefix: str) -> int:
        return len({name.split(".")[prefix.count(".")] for name in names if name.startswith(prefix)})

    width, _, _, patch = shape("visual.conv1.weight", 4)
    positions, _ = shape("visual.positional_embedding", 2)
    grid = math.isqrt(positions - 1)
    if grid**2 != positions - 1:
        raise ValueError(
            f"weight 'visual.positional_embedding' has {positions - 1} positions, expected those of a square"
        )
    if width not in HEAD_WIDTHS:
        raise ValueError(
            f"a vision transformer of width {width}, whose attention heads the file does not tell; known are "
            f"{', '.join(map(str, HEAD_WIDTHS))}"
        )
    vocabulary, text_width = shape(f"{text}token_embedding.weight", 2)
    return CLIPConfig(
        projection_dim=shape("visual.proj", 2)[0],
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=shape("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
            num_hidden_layers=layers("visual.transformer.resblocks."),
            num_attention_heads=width // HEAD_WIDTHS[width],
            image_size=grid * patch,
            patch_size=patch,
            hidden_act=hidden_act,
        ),
        text_config=CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            intermediate_size=shape(f"{text}transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
            num_hidden_layers=layers(f"{text}transformer.resblocks."),
            num_attention_heads=max(1, text_width // TEXT_HEAD_WIDTH),
            max_position_embeddings=shape(f"{text}positional_embedding", 2)[0],
            hidden_act=hidden_act,
            eos_token_id=2,  # the token of the largest id ends a text
        ),
    )
