"""Stable Diffusion checkpoints as folders in the layout of diffusers, in and out, without torch.

A folder holds `model_index.json` and one subfolder per component (`unet/`, `vae/`, `text_encoder/`, `tokenizer/`,
`scheduler/`); a network's subfolder holds `config.json` and its weights as safetensors. The modules of
`flax_pref.models` carry the attribute names of the published weights, so the mapping is a short table: leaf names,
transpositions, old names.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flax_pref.checkpoints.tokenizer import CLIPTokenizer, load_tokenizer
from flax_pref.files import replacing
from flax_pref.models.clip import CLIPTextConfig, CLIPTextModel
from flax_pref.models.unet import UNet2DCondition, UNetConfig
from flax_pref.models.vae import AutoencoderKL, VAEConfig


class Network(NamedTuple):
    """A network as data; `nnx.merge(graphdef, params)` is the module.

    Attributes:
        config: UNetConfig, VAEConfig or CLIPTextConfig.
        graphdef: structure of the module, hashable.
        params: nested dict of arrays.
    """

    config: Any
    graphdef: nnx.GraphDef
    params: dict


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The parts of a Stable Diffusion checkpoint; `scheduler_config` is scheduler/scheduler_config.json as it is."""

    unet: Network
    vae: Network
    text_encoder: Network
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]


# ----------------------------------------------------------------------------------------------------------------------
# The mapping

LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# Axes of ours in the order of torch: [in, out] -> [out, in] and HWIO -> OIHW. The inverse of each is its argsort.
KERNEL_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}


@dataclasses.dataclass(frozen=True)
class Component:
    """How one kind of network is stored.

    Attributes:
        config: dataclass of its config.json.
        module: class of the network.
        library: package and class that load it, as model_index.json names them.
        stem: name of its weight files.
        old_names: (pattern, replacement) pairs that turn names of older or newer files into those of our modules.
        ignored: pattern of stored names that are no weights.
    """

    config: type
    module: type[nnx.Module]
    library: Callable[[Any], tuple[str, str]]
    stem: str
    old_names: tuple[tuple[str, str], ...] = ()
    ignored: str = r"$^"


COMPONENTS = {
    "unet": Component(
        config=UNetConfig,
        module=UNet2DCondition,
        library=lambda config: ("diffusers", "UNet2DConditionModel"),
        stem="diffusion_pytorch_model",
    ),
    "vae": Component(
        config=VAEConfig,
        module=AutoencoderKL,
        library=lambda config: ("diffusers", "AutoencoderKL"),
        stem="diffusion_pytorch_model",
        old_names=(
            (r"\.query\.", ".to_q."),
            (r"\.key\.", ".to_k."),
            (r"\.value\.", ".to_v."),
            (r"\.proj_attn\.", ".to_out.0."),
        ),
    ),
    "text_encoder": Component(
        config=CLIPTextConfig,
        module=CLIPTextModel,
        library=lambda config: ("transformers", config.architectures[0]),
        stem="model",
        # transformers 5 leaves out the prefix that the files on the Hub have.
        old_names=((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),),
        ignored=r"\.position_ids$",
    ),
}


def to_stored(params: Mapping) -> dict[str, np.ndarray]:
    """Parameters (or their gradients) under the names and in the axes of published checkpoints.

    Raises:
        ValueError: a leaf that published checkpoints have not, e.g. a LoRA matrix.
    """
    return {_stored_name(path): _to_torch_axes(path[-1], np.asarray(leaf)) for path, leaf in _flatten(params)}


def _stored_name(path: tuple) -> str:
    if path[-1] not in LEAF_NAMES:
        raise ValueError(
            f"parameter {'.'.join(map(str, path))!r} is not part of a published checkpoint; "
            "split or merge adapters first"
        )
    return ".".join(map(str, (*path[:-1], LEAF_NAMES[path[-1]])))


def _flatten(params: Mapping, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*path, key))
        else:
            yield (*path, key), value


def _to_torch_axes(leaf: str, array: np.ndarray) -> np.ndarray:
    return array.transpose(KERNEL_AXES[array.ndim]) if leaf == "kernel" else array


def _from_torch_axes(leaf: str, array: np.ndarray) -> np.ndarray:
    return array.transpose(np.argsort(KERNEL_AXES[array.ndim])) if leaf == "kernel" else array


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def load_pipeline(folder: str | Path, dtype=jnp.float32, *, param_dtype=None) -> Pipeline:
    """Reads a Stable Diffusion checkpoint.

    Args:
        folder: contains model_index.json.
        dtype: what the networks compute in.
        param_dtype: what their parameters are kept in; None: as `dtype`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the pipeline, a config field or a weight is not what these networks need.
    """
    folder = Path(folder)
    index = _read_json(folder / "model_index.json")
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise ValueError(
            f"{folder / 'model_index.json'}: _class_name={index.get('_class_name')!r} is not supported; supported: "
            "'StableDiffusionPipeline'"
        )
    return Pipeline(
        unet=load_unet(folder / "unet", dtype, param_dtype=param_dtype),
        vae=load_vae(folder / "vae", dtype, param_dtype=param_dtype),
        text_encoder=load_text_encoder(folder / "text_encoder", dtype, param_dtype=param_dtype),
        tokenizer=load_tokenizer(folder / "tokenizer"),
        scheduler_config=_read_json(folder / "scheduler" / "scheduler_config.json"),
    )


def load_unet(folder: str | Path, dtype=jnp.float32, *, param_dtype=None) -> Network:
    """Reads a `unet/` folder; arguments and errors as in `load_pipeline`."""
    return _load("unet", folder, dtype, param_dtype)


def load_vae(folder: str | Path, dtype=jnp.float32, *, param_dtype=None) -> Network:
    """Reads a `vae/` folder; arguments and errors as in `load_pipeline`."""
    return _load("vae", folder, dtype, param_dtype)


def load_text_encoder(folder: str | Path, dtype=jnp.float32, *, param_dtype=None) -> Network:
    """Reads a `text_encoder/` or `text_encoder_2/` folder; arguments and errors as in `load_pipeline`."""
    return _load("text_encoder", folder, dtype, param_dtype)


def _load(kind: str, folder: str | Path, dtype, param_dtype) -> Network:
    folder, component = Path(folder), COMPONENTS[kind]
    param_dtype = dtype if param_dtype is None else param_dtype
    config_file = folder / "config.json"
    try:
        config = component.config.from_dict(_read_json(config_file))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    module = nnx.eval_shape(
        lambda: component.module(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(params=0))
    )
    graphdef, state = nnx.split(module)
    params = nnx.to_pure_dict(state)
    _fill(params, folder, component)
    return Network(config, graphdef, params)


def _fill(params: dict, folder: Path, component: Component) -> None:
    """Replaces the shapes in `params` by the stored weights, one tensor at a time."""
    wanted = {_stored_name(path): (path, leaf) for path, leaf in _flatten(params)}
    stored = {}  # name in our modules -> (file, name in the file)
    for name, file in _weight_files(folder, component.stem).items():
        if not re.search(component.ignored, name):
            stored[_current_name(name, component)] = (file, name)
    source = folder if len({file for file, _ in stored.values()}) > 1 else next(iter(stored.values()), [folder])[0]
    if missing := sorted(wanted.keys() - stored.keys()):
        raise ValueError(
            f"{source}: no weight {missing[0]!r} ({_count(missing)} missing); config.json describes a network that has "
            "it: check that config and weights belong together"
        )
    if surplus := sorted(stored.keys() - wanted.keys()):
        raise ValueError(
            f"{source}: weight {stored[surplus[0]][1]!r} ({_count(surplus)} too many) has no place in the network that "
            "config.json describes: check that config and weights belong together"
        )
    for file in sorted({file for file, _ in stored.values()}):
        with _open(file) as tensors:
            for name, (path, abstract) in wanted.items():
                if stored[name][0] == file:
                    array = tensors.get_tensor(stored[name][1])
                    shape = _to_torch_axes(path[-1], np.broadcast_to(0, abstract.shape)).shape
                    if array.shape != shape:
                        raise ValueError(
                            f"{file}: weight {stored[name][1]!r} has shape {list(array.shape)}, expected {list(shape)} "
                            "from config.json: check that config and weights belong together"
                        )
                    _set(params, path, jnp.asarray(_from_torch_axes(path[-1], array), abstract.dtype))


def _current_name(name: str, component: Component) -> str:
    for pattern, replacement in component.old_names:
        name = re.sub(pattern, replacement, name)
    return name


def _count(names: list[str]) -> str:
    return f"{len(names)} weight" + "s" * (len(names) > 1)


def _set(params: dict, path: tuple, value: jax.Array) -> None:
    for key in path[:-1]:
        params = params[key]
    params[path[-1]] = value


def _weight_files(folder: Path, stem: str) -> dict[str, Path]:
    """The file that holds each stored weight: one file or shards with an index, full or half precision."""
    for variant in ("", ".fp16"):
        if (file := folder / f"{stem}{variant}.safetensors").is_file():
            with _open(file) as tensors:
                return dict.fromkeys(tensors.keys(), file)
        if (index := folder / f"{stem}.safetensors.index{variant}.json").is_file():
            return {name: folder / shard for name, shard in _read_json(index)["weight_map"].items()}
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise FileNotFoundError(
        f"{folder}: no weights; expected {stem}.safetensors, {stem}.fp16.safetensors or a shard index, found {found}. "
        "Weights in .bin files can be converted with diffusers: save_pretrained(folder, safe_serialization=True)"
    )


def _open(file: Path) -> safe_open:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing, although the shard index of its folder names it")
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error}); download it again") from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a folder in the layout of diffusers")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def save_pipeline(pipeline: Pipeline, folder: str | Path, *, dtype=jnp.float32) -> None:
    """Writes a folder that `StableDiffusionPipeline.from_pretrained` of diffusers and `load_pipeline` read.

    The folder appears under its name only when it is complete.

    Args:
        pipeline: what to write.
        folder: must not exist, or be empty.
        dtype: of the stored weights, e.g. `jnp.float16`.

    Raises:
        FileExistsError: `folder` holds something.
        ValueError: a network holds parameters that its published form has not, e.g. LoRA matrices.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: exists and is not empty; choose another folder or remove it")
    with replacing(folder) as unfinished:
        networks = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
        for kind, network in networks.items():
            save_network(network, unfinished / kind, dtype=dtype)
        pipeline.tokenizer.save(unfinished / "tokenizer")
        _write_json(unfinished / "scheduler" / "scheduler_config.json", pipeline.scheduler_config)
        index = {
            "_class_name": "StableDiffusionPipeline",
            **{kind: list(COMPONENTS[kind].library(network.config)) for kind, network in networks.items()},
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", pipeline.scheduler_config["_class_name"]],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
        _write_json(unfinished / "model_index.json", index)


def save_network(network: Network, folder: str | Path, *, dtype=jnp.float32) -> None:
    """Writes the component folder (config.json and one safetensors file) of one network.

    Raises:
        ValueError: the network holds parameters that its published form has not, e.g. LoRA matrices.
    """
    folder = Path(folder)
    component = next(component for component in COMPONENTS.values() if isinstance(network.config, component.config))
    # safetensors writes the bytes of a transposed array in the wrong order without complaint.
    tensors = {name: np.ascontiguousarray(array, dtype) for name, array in to_stored(network.params).items()}
    _write_json(folder / "config.json", network.config.to_dict())
    save_file(tensors, folder / f"{component.stem}.safetensors", metadata={"format": "pt"})


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
