"""Networks as component folders of a diffusers checkpoint, in and out: config.json and safetensors files.

The modules of `flax_pref.models` carry the attribute names of the published weights, so the mapping is a short table:
leaf names, transpositions, old names. Weights pass one by one, so a network never lies in host memory twice.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flax_pref.checkpoints.torch_files import StoredTensor, read_torch_file
from flax_pref.files import new_folder, read_json, write_json
from flax_pref.models.clip import CLIPTextConfig, CLIPTextModel
from flax_pref.models.clip_vision import CLIPConfig, CLIPModel, CLIPVisionModel
from flax_pref.models.dinov2 import DINOv2, DINOv2Config
from flax_pref.models.layers import Keys
from flax_pref.models.network import Network
from flax_pref.models.unet import UNet2DCondition, UNetConfig
from flax_pref.models.vae import AutoencoderKL, VAEConfig
from flax_pref.waits import clock

LAYOUT = "a folder in the layout of diffusers"
# `(path of a parameter, its shape) -> sharding`, e.g. from rules by path.
Placement = Callable[[tuple, tuple[int, ...]], jax.sharding.Sharding]


# ----------------------------------------------------------------------------------------------------------------------
# The mapping

LEAF_NAMES = {
    **{"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"},
    **{name: name for name in ("class_embedding", "logit_scale", "cls_token", "pos_embed", "register_tokens", "gamma")},
    **{"mean": "running_mean", "variance": "running_var", "inv_freq": "inv_freq"},
}
# Axes of ours in the order of torch: [in, out] -> [out, in] and HWIO -> OIHW. The inverse of each is its argsort.
KERNEL_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}
FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # by safetensors' names
STORED_DTYPES = ("float16", "bfloat16", "float32", "float64", *FLOAT8.values())


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
        torch_stem: name of its weight files where torch has written them, read by `checkpoints.torch_files`.
        described_by: what says of which sizes the network is, for messages.
        compute_dtype: what a network computes in, from its config and the dtype that is asked for.
    """

    config: type
    module: Callable[..., nnx.Module]
    library: Callable[[Any], tuple[str, str]]
    stem: str
    old_names: tuple[tuple[str, str], ...] = ()
    ignored: str = r"$^"
    torch_stem: str = "pytorch_model"
    described_by: str = "config.json"
    compute_dtype: Callable[[Any, Any], Any] = lambda config, dtype: dtype

    def abstract(self, config: Any, dtype=jnp.float32, *, param_dtype=None) -> Network:
        """A network with shapes instead of weights; arguments as in `load_network`.

        Raises:
            ValueError: fields of the config contradict each other.
        """
        kinds = {
            "dtype": self.compute_dtype(config, dtype),
            "param_dtype": dtype if param_dtype is None else param_dtype,
        }
        try:
            module = nnx.eval_shape(lambda: self.module(config, **kinds, rngs=Keys(jax.random.key(0))))
        except (TypeError, ArithmeticError, LookupError) as error:
            raise ValueError(f"{type(config).__name__}: describes no network that can be built ({error})") from error
        graphdef, state = nnx.split(module)
        return Network(config, graphdef, nnx.to_pure_dict(state))


def _vae_dtype(config: VAEConfig, dtype) -> Any:
    """SDXL's decoder exceeds the range of float16; its config says `force_upcast`."""
    return jnp.float32 if config.force_upcast and jnp.dtype(dtype) == jnp.float16 else dtype


COMPONENTS = {
    "unet": Component(
        config=UNetConfig,
        module=UNet2DCondition,
        library=lambda config: ("diffusers", "UNet2DConditionModel"),
        stem="diffusion_pytorch_model",
        torch_stem="diffusion_pytorch_model",
    ),
    "vae": Component(
        config=VAEConfig,
        module=AutoencoderKL,
        library=lambda config: ("diffusers", "AutoencoderKL"),
        stem="diffusion_pytorch_model",
        torch_stem="diffusion_pytorch_model",
        old_names=(
            (r"\.query\.", ".to_q."),
            (r"\.key\.", ".to_k."),
            (r"\.value\.", ".to_v."),
            (r"\.proj_attn\.", ".to_out.0."),
        ),
        compute_dtype=_vae_dtype,
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
    "clip": Component(
        config=CLIPConfig,
        module=CLIPModel,
        library=lambda config: ("transformers", "CLIPModel"),
        stem="model",
        ignored=r"\.position_ids$",
    ),
    "dinov2": Component(
        config=DINOv2Config,
        module=DINOv2,
        library=lambda config: ("transformers", "Dinov2Model"),
        stem="model",
        # Of a classifier, whose network has a name before those of its parts.
        old_names=(
            (r"^dinov2(_with_registers)?\.", ""),
            (r"^embeddings\.(cls_token|register_tokens)$", r"\1"),
            (r"^embeddings\.position_embeddings$", "pos_embed"),
            (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"^encoder\.layer\.", "blocks."),
            (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
            (r"\.attention\.output\.dense\.", ".attn.proj."),
            (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
            (r"\.mlp\.weights_in\.", ".mlp.w12."),
            (r"\.mlp\.weights_out\.", ".mlp.w3."),
            (r"^layernorm\.", "norm."),
        ),
        ignored=r"(^|\.)mask_token$|^classifier\.",
    ),
}
# The part of a CLIP folder that embeds images.
COMPONENTS["clip_vision"] = dataclasses.replace(
    COMPONENTS["clip"],
    module=CLIPVisionModel,
    ignored=r"\.position_ids$|^text_model\.|^text_projection\.|^logit_scale$",
)


def stored_names(params: Mapping) -> list[str]:
    """Names of parameters in published checkpoints; errors as `to_stored`."""
    return [_stored_name(path) for path, _ in _flatten(params)]


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


class Tensors(Protocol):
    """The weights of an open file, one of safetensors or of torch; a context manager."""

    def keys(self) -> Iterable[str]:
        """Their names."""
        ...

    def get_tensor(self, name: str) -> np.ndarray:
        """One of them."""
        ...

    def get_slice(self, name: str) -> Any:
        """One of them, not read yet; has `get_shape()`."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: Any, error: Any, traceback: Any, /) -> Any: ...


class SafeTensors:
    """`Tensors` of a safetensors file, also those of 8 bits, a type that safetensors does not find in NumPy.

    Raises:
        SafetensorError, OSError: the file is damaged.
    """

    def __init__(self, file: Path):
        self._file, self._tensors = file, safe_open(file, framework="numpy")
        self._entries: dict[str, Any] = {}
        self._start = 0

    def __enter__(self) -> Self:
        self._tensors.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._tensors.__exit__(*error)

    def keys(self) -> Iterable[str]:
        """The names of the weights."""
        return self._tensors.keys()

    def get_slice(self, name: str) -> Any:
        """The weight of this name, not read yet."""
        return self._tensors.get_slice(name)

    def get_tensor(self, name: str) -> np.ndarray:
        """The weight of this name."""
        dtype = self.get_slice(name).get_dtype()
        if dtype not in FLOAT8:
            return self._tensors.get_tensor(name)
        with self._file.open("rb") as stream:
            if not self._entries:
                size = int.from_bytes(stream.read(8), "little")
                self._entries, self._start = json.loads(stream.read(size)), 8 + size
            start, end = self._entries[name]["data_offsets"]
            stream.seek(self._start + start)
            stored = np.frombuffer(stream.read(end - start), jnp.dtype(FLOAT8[dtype]))
        return stored.reshape(self._entries[name]["shape"])

    def metadata(self) -> Mapping[str, str]:
        """The texts that the file holds beside its weights."""
        return self._tensors.metadata() or {}


class TorchTensors:
    """`Tensors` of what `read_torch_file` has read: weights by name, alone or as the state_dict beside other things."""

    def __init__(self, file: Path, tensors: Any):
        if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
            tensors = tensors["state_dict"]
        if not isinstance(tensors, dict) or not all(isinstance(value, StoredTensor) for value in tensors.values()):
            raise ValueError(f"{file}: holds other than weights by name; expected the state dict of a network")
        self._tensors = tensors

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        pass

    def keys(self) -> Iterable[str]:
        """The names of the weights."""
        return self._tensors.keys()

    def get_tensor(self, name: str) -> np.ndarray:
        """The weight of this name."""
        return self._tensors[name].read()

    def get_slice(self, name: str) -> StoredTensor:
        """The weight of this name, not read yet."""
        return self._tensors[name]


def open_tensors(file: Path) -> Tensors:
    """Opens a file of weights, of safetensors or, by its other suffix, of torch.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing, although the shard index of its folder names it; download it again")
    if file.suffix != ".safetensors":
        return TorchTensors(file, read_torch_file(file))
    try:
        return SafeTensors(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error}); download it again") from error


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each weight of a file, none of which is read; errors as `open_tensors`."""
    with open_tensors(file) as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def read_config(kind: str, folder: str | Path) -> Any:
    """The config of a component folder; kind as in `load_network`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a field is not what the network needs; names the file, the field and what is supported.
    """
    file = Path(folder) / "config.json"
    values = read_json(file, expected=LAYOUT)
    try:
        return COMPONENTS[kind].config.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def abstract_network(kind: str, config: Any, dtype=jnp.float32, *, param_dtype=None) -> Network:
    """See `Component.abstract`; kind as in `load_network`."""
    return COMPONENTS[kind].abstract(config, dtype, param_dtype=param_dtype)


def load_network(
    kind: str,
    folder: str | Path,
    dtype=jnp.float32,
    *,
    param_dtype=None,
    variant: str | None = None,
    place: Placement | None = None,
) -> Network:
    """Reads a component folder.

    Args:
        kind: "unet", "vae", "text_encoder", "clip", "clip_vision" or "dinov2".
        folder: contains config.json and the weights.
        dtype: what the network computes in.
        param_dtype: what its parameters are kept in; None: as `dtype`.
        variant: of the weight files, e.g. "fp16"; None: the full ones if they are there, else any variant.
        place: says where each parameter goes; None: the default device.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a config field or a weight is not what the network needs, or a file is damaged.
    """
    folder, component = Path(folder), COMPONENTS[kind]
    config = read_config(kind, folder)
    try:
        network = abstract_network(kind, config, dtype, param_dtype=param_dtype)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    fill(network.params, component, _weight_files(folder, component, variant), folder, place)
    return network


def fill(
    params: dict,
    component: Component,
    files: Mapping[str, Path],
    folder: Path,
    place: Placement | None = None,
    *,
    open_file: Callable[[Path], Tensors] = open_tensors,
    names: Mapping[str, str] | None = None,
) -> None:
    """Replaces the shapes in `params` by the stored weights, one tensor at a time.

    Args:
        params: of an abstract network; changed in place.
        component: how the network is stored.
        files: the file of each stored weight.
        folder: of the files, or the only one.
        place: as in `load_network`.
        open_file: gives the weights of one.
        names: name in the file of each weight, by its name in our modules; None: as `component.old_names` says.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a weight is missing, has no place or is not what the network needs.
    """
    wanted = {_stored_name(path): (path, leaf) for path, leaf in _flatten(params)}
    stored = {}  # name in our modules -> (file, name in the file)
    ours = {theirs: name for name, theirs in (names or {}).items()}
    for name, file in files.items():
        if not re.search(component.ignored, name):
            stored[_current_name(name, component) if names is None else ours.get(name, name)] = (file, name)
    source = folder if len({file for file, _ in stored.values()}) > 1 else next(iter(stored.values()), [folder])[0]
    if missing := sorted(wanted.keys() - stored.keys()):
        told = missing[0] if names is None else names[missing[0]]
        raise ValueError(
            f"{source}: no weight {told!r} ({_count(missing)} missing); {component.described_by} describes a network "
            "that has it: check that config and weights belong together"
        )
    if surplus := sorted(stored.keys() - wanted.keys()):
        raise ValueError(
            f"{source}: weight {stored[surplus[0]][1]!r} ({_count(surplus)} too many) has no place in the network that "
            f"{component.described_by} describes: check that config and weights belong together"
        )
    read, total = 0, sum(math.prod(leaf.shape) * leaf.dtype.itemsize for _, leaf in wanted.values())
    with clock(lambda: f"loading {folder.name}: {read / 1e9:.2f} of {total / 1e9:.2f} GB"):
        for file in sorted({file for file, _ in stored.values()}):
            names = {there: name for name, (holder, there) in stored.items() if holder == file}
            for there, array in _read_tensors(open_file, file, list(names)):
                path, abstract = wanted[names[there]]
                shape = _to_torch_axes(path[-1], np.broadcast_to(0, abstract.shape)).shape
                if array.shape != shape:
                    raise ValueError(
                        f"{file}: weight {there!r} has shape {list(array.shape)}, expected {list(shape)} from "
                        f"{component.described_by}: check that config and weights belong together"
                    )
                with np.errstate(over="ignore"):
                    array = _from_torch_axes(path[-1], array).astype(abstract.dtype)
                if not np.isfinite(array).all():
                    raise ValueError(
                        f"{file}: weight {there!r} holds numbers too large for {array.dtype.name}; if the file is not "
                        "damaged, load the network in another dtype"
                    )
                _set(params, path, _put(array, place and place(path, abstract.shape)))
                read += array.nbytes


def _put(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


REOPEN_AFTER = 16 * 2**20  # bytes


def _read_tensors(
    open_file: Callable[[Path], Tensors], file: Path, names: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file, one by one.

    The file is mapped into memory, and what has been read of it stays there until it is closed: it is opened again now
    and then, or a file of 10 GB would take 10 GB beside the weights.
    """
    while names:
        with open_file(file) as tensors:
            size = 0
            while names and size < REOPEN_AFTER:
                name = names.pop(0)
                try:
                    array = tensors.get_tensor(name)
                except (SafetensorError, OSError, TypeError, ValueError, KeyError, AttributeError) as error:
                    raise ValueError(f"{file}: weight {name!r} cannot be read ({error}); download it again") from error
                if array.dtype.name not in STORED_DTYPES:
                    raise ValueError(
                        f"{file}: weight {name!r} is stored as {array.dtype.name}, expected one of "
                        f"{', '.join(STORED_DTYPES)}: quantised weights are not supported"
                    )
                if not np.isfinite(array).all():
                    raise ValueError(
                        f"{file}: weight {name!r} holds numbers that are not finite: the file is damaged or comes from "
                        "a failed training; download it again"
                    )
                size += array.nbytes
                yield name, array


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


def _weight_files(folder: Path, component: Component, variant: str | None) -> dict[str, Path]:
    """The file that holds each stored weight: one file, or shards with an index."""
    stem = component.stem
    kinds = ((stem, "safetensors"), (component.torch_stem, "bin"))
    suffixes = ("", ".fp16") if variant is None else (f".{variant}",)
    for (name, kind), suffix in itertools.product(kinds, suffixes):
        if (file := folder / f"{name}{suffix}.{kind}").is_file():
            with open_tensors(file) as tensors:
                return dict.fromkeys(tensors.keys(), file)
        if (index := folder / f"{name}.{kind}.index{suffix}.json").is_file():
            shards = read_json(index, expected="the index of a network in shards").get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise ValueError(
                    f"{index}: no weight_map that names the file of each weight: the index is damaged; download it "
                    "again"
                )
            if strange := [shard for shard in shards.values() if shard != Path(shard).name or "\0" in shard]:
                raise ValueError(
                    f"{index}: weight_map names {strange[0]!r:.100}, expected files in its folder; download it again"
                )
            listed = {name: folder / shard for name, shard in shards.items()}
            held: dict[str, Path] = {}  # with what the index passes over
            for file in sorted(set(listed.values())):
                with open_tensors(file) as tensors:
                    held |= {name: file for name in tensors.keys()}  # noqa: SIM118
            return held | listed
    found = sorted(path.name for path in folder.iterdir())
    expected = f"{stem}{f'.{variant}' if variant else ''}.safetensors" + " or a shard index"
    raise FileNotFoundError(
        f"{folder}: no weights; expected {expected}, found {', '.join(found) or 'nothing'}; download the folder again, "
        "or with another variant if that is all there is (variant='fp16')"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Writing

SHARD_BYTES = 5 * 10**9


def save_network(network: Network, folder: str | Path, *, dtype=jnp.float32, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the component folder of one network, as `from_pretrained` of diffusers or transformers reads it.

    The folder appears under its name only when it is complete.

    Args:
        network: what to write.
        folder: must not exist, or be empty.
        dtype: of the stored weights, e.g. `jnp.float16`.
        shard_bytes: larger networks are written as several files of at most this size, with an index.

    Raises:
        FileExistsError: `folder` holds something.
        ValueError: the network holds parameters that its published form has not, e.g. LoRA matrices.
    """
    component = next(component for component in COMPONENTS.values() if isinstance(network.config, component.config))
    leaves = {_stored_name(path): (path[-1], leaf) for path, leaf in _flatten(network.params)}
    shards, size = [[]], 0
    for name, (_, leaf) in leaves.items():
        nbytes = leaf.size * jnp.dtype(dtype).itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    with new_folder(folder) as unfinished:
        write_json(unfinished / "config.json", network.config.to_dict())
        files = [f"{component.stem}.safetensors"]
        if len(shards) > 1:
            files = [f"{component.stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
            index = {
                "metadata": {"total_size": sum(leaf.size for _, leaf in leaves.values()) * jnp.dtype(dtype).itemsize},
                "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
            }
            write_json(unfinished / f"{component.stem}.safetensors.index.json", index)
        for file, names in zip(files, shards, strict=True):
            # safetensors writes the bytes of a transposed array in the wrong order without complaint.
            tensors = {
                name: np.asarray(_to_torch_axes(leaves[name][0], np.asarray(leaves[name][1])), dtype, order="C")
                for name in names
            }
            save_file(tensors, unfinished / file, metadata={"format": "pt"})
