"""LoRA files in the format of PEFT and diffusers, in and out, and networks with a bank of adapters.

A file holds one module: for each adapted layer `unet.<layer>.lora_A.weight [r, in]` and `unet.<layer>.lora_B.weight
[out, r]`, with two more axes if the layer is a convolution. `StableDiffusionPipeline.load_lora_weights` reads it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flax_pref.checkpoints.diffusers import KERNEL_AXES, Network
from flax_pref.files import replacing
from flax_pref.models.lora import DEFAULT_TARGETS, add_lora, join_lora, split_lora, stack_lora

KEY = re.compile(r"(?:unet\.)?(?P<layer>[\w.]+)\.lora_(?P<matrix>[AB])\.weight")
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration, as JSON
# Settings of PEFT under which a delta is not `alpha / r A B`, or not with the same alpha in all layers.
UNSUPPORTED = ("alpha_pattern", "lora_bias", "use_dora", "use_rslora")


# ----------------------------------------------------------------------------------------------------------------------
# Networks


def lora_network(
    network: Network,
    modules: Sequence[str],
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = DEFAULT_TARGETS,
    key: jax.Array,
) -> Network:
    """The network with a bank of new adapters, which change nothing yet; arguments as in `models.lora.add_lora`.

    `network` stays as it is: its graphdef is the one for the weights that `merge_lora` returns.
    """
    module = _adapted(network, modules, rank, alpha, targets, key)
    graphdef, state = nnx.split(module)
    return network._replace(graphdef=graphdef, params=nnx.to_pure_dict(state))


def _adapted(network: Network, modules, rank, alpha, targets, key) -> nnx.Module:
    module = nnx.merge(network.graphdef, network.params)
    add_lora(module, modules, rank=rank, alpha=alpha, targets=targets, rngs=nnx.Rngs(params=key))
    return module


def load_lora_network(network: Network, files: Mapping[str, str | Path]) -> Network:
    """The network with a bank of stored adapters, e.g. `{"pos": "pos.safetensors", "neg": "neg.safetensors"}`.

    The bank's alpha is its rank; the scales of the files are multiplied into B.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not understood or does not fit the network, or the files differ in layers or rank.
    """
    banks = []
    for file in files.values():
        lora, rank, alpha = load_lora(file)
        flat = flatten_dict(lora)
        banks.append(
            unflatten_dict({path: flat[path] * (alpha / rank if path[-1] == "lora_b" else 1) for path in flat})
        )
    names = ", ".join(map(str, files.values()))
    try:
        lora = stack_lora(banks)
        targets = sorted({".".join(map(str, path[:-1])) for path in flatten_dict(lora)})
        key = jax.random.key(0)  # of shapes only
        module = nnx.eval_shape(lambda: _adapted(network, tuple(files), rank, rank, targets, key))
    except ValueError as error:
        raise ValueError(f"{names}: {error}") from error
    graphdef, state = nnx.split(module)
    _, expected = split_lora(nnx.to_pure_dict(state))
    stored = flatten_dict(lora)
    for path, leaf in flatten_dict(expected).items():
        if stored[path].shape != leaf.shape:
            raise ValueError(
                f"{names}: {'.'.join(map(str, path))} has shape {list(stored[path].shape)}, expected "
                f"{list(leaf.shape)} [module, ...]: the adapters belong to another network"
            )
    return network._replace(graphdef=graphdef, params=join_lora(network.params, lora))


# ----------------------------------------------------------------------------------------------------------------------
# Files


def save_lora(lora: dict, file: str | Path, *, alpha: float, dtype=jnp.float32) -> None:
    """Writes one module; the file appears under its name only when it is complete.

    The scale `alpha / rank` is multiplied into B, so that the file means the same to every reader: diffusers looks for
    alpha in a file's metadata, while its older versions and other programs take alpha to be the rank. `load_lora`
    gives back the same deltas, with alpha = rank.

    Args:
        lora: nested parameters of M = 1 module; see `split_lora` and `select_lora`.
        file: e.g. `pos.safetensors`; replaced if it exists.
        alpha: as given to `add_lora`.
        dtype: of the stored matrices.

    Raises:
        ValueError: `lora` holds other parameters, no module or several.
    """
    file, flat, tensors = Path(file), flatten_dict(lora), {}
    if not flat or any(path[-1] not in ("lora_a", "lora_b") or len(leaf) != 1 for path, leaf in flat.items()):
        raise ValueError(
            f"{file}: expected the adapters of one module, lora_a [1, ..., r] and lora_b [1, r, out]; split_lora takes "
            "them from the parameters of a network, and select_lora one module from a bank"
        )
    for path in (path for path in flat if path[-1] == "lora_a"):
        a, b = (np.asarray(flat[*path[:-1], leaf][0], np.float32) for leaf in ("lora_a", "lora_b"))
        b = b * np.float32(alpha / len(b))
        b = b.reshape((1,) * (a.ndim - 2) + b.shape)  # of a convolution: 1x1
        layer = ".".join(map(str, path[:-1]))
        for name, matrix in (("A", a), ("B", b)):
            # safetensors writes the bytes of a transposed array in the wrong order without complaint.
            array = np.ascontiguousarray(matrix.transpose(KERNEL_AXES[matrix.ndim]), dtype)
            tensors[f"unet.{layer}.lora_{name}.weight"] = array
    with replacing(file) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})


def load_lora(file: str | Path) -> tuple[dict, int, float]:
    """Reads one module as `save_lora`, or diffusers with PEFT, has written it.

    Alpha is what the file's metadata say, and the rank where they say nothing.

    Returns:
        (nested parameters of M = 1 module in float32, rank, alpha).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds other than plain LoRA of one rank for a UNet.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a safetensors file of LoRA weights")
    try:
        with safe_open(file, framework="numpy") as tensors:
            metadata = (tensors.metadata() or {}).get(METADATA, "{}")
            stored = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error})") from error

    lora = {}
    for name, array in stored.items():
        match = KEY.fullmatch(name)
        if match is None or array.ndim not in KERNEL_AXES:
            raise ValueError(
                f"{file}: weight {name!r} with shape {list(array.shape)} is not understood; expected "
                "unet.<layer>.lora_A.weight and unet.<layer>.lora_B.weight, as save_lora_weights of diffusers writes"
            )
        leaf = {"A": "lora_a", "B": "lora_b"}[match["matrix"]]
        matrix = array.transpose(np.argsort(KERNEL_AXES[array.ndim]))
        if leaf == "lora_b":
            matrix = matrix.reshape(matrix.shape[-2:])
        layer = (int(key) if key.isdigit() else key for key in match["layer"].split("."))
        lora[*layer, leaf] = jnp.asarray(matrix, jnp.float32)[None]

    layers = {path[:-1] for path in lora}
    ranks = {leaf.shape[-1 if path[-1] == "lora_a" else 1] for path, leaf in lora.items()}
    if len(lora) != 2 * len(layers) or len(ranks) != 1:
        raise ValueError(
            f"{file}: expected lora_A and lora_B of one rank for each layer, found {len(lora)} matrices of ranks "
            f"{sorted(ranks)} for {len(layers)} layers"
        )
    rank = ranks.pop()
    config = {key.removeprefix("unet."): value for key, value in json.loads(metadata).items()}
    if used := [f"{key}={config[key]!r}" for key in UNSUPPORTED if config.get(key)]:
        raise ValueError(f"{file}: {used[0]} is not supported; supported: plain LoRA with one alpha for all layers")
    return unflatten_dict(lora), rank, float(config.get("lora_alpha", rank))
