"""Adapters folded into weights: those of UNets that are no plain LoRA, and all of text encoders.

LoHa, LoKr, IA3, GLoRA, Tucker-decomposed LoRA, differences of whole weights, biases and normalisations (LyCORIS,
arXiv:2309.14859), and DoRA (arXiv:2402.09353), in the names of LyCORIS, sd-scripts, OneTrainer and PEFT. Their deltas
are no product of two small matrices that rows of one batch could share, so such a module gets weights of its own.

Adapters of text encoders are folded whatever their kind, for prompts are encoded once and not in every step.

Weights W are `[out, in]` or `[out, in, h, w]` here, as files have them. `s = alpha / r`, or 1 where no alpha is stored.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from flax_pref.checkpoints.lora import (
    MAGNITUDES,
    OTHER_ENDINGS,
    PAIRS,
    Part,
    check_family,
    layers_by_name,
    peft_settings,
    read_adapter_file,
)
from flax_pref.checkpoints.weights import KERNEL_AXES
from flax_pref.models.network import Network
from flax_pref.models.tree import flatten_dict

WORDS: dict[Part, str] = {"unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
Parts = dict[str, np.ndarray]  # what a file has of one layer, by the endings of names

# What a name holds, by its ending; "weight" alone is IA3's.
FACTORS = {
    **{f".{ending}": ending for ending in ("lora_up.weight", "lora_down.weight", "alpha", *OTHER_ENDINGS)},
    **dict.fromkeys((a for a, _ in PAIRS), "lora_down.weight"),
    **dict.fromkeys((b for _, b in PAIRS), "lora_up.weight"),
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
    ".weight": "weight",
}
# Endings of adapters that DoRA gives a magnitude each.
LOW_RANK = r"lora_up|lora_down|hada_|lokr_"


def has_other_adapters(names: Iterable[str]) -> bool:
    """Whether a file holds more than plain LoRA, by the names of its weights."""
    return any(name.endswith(tuple(f".{ending}" for ending in OTHER_ENDINGS)) for name in names)


def fold_adapters(file: str | Path, network: Network, part: Part = "unet") -> Network:
    """The network with its adapters of a file in its weights; layers without any share their arrays with it.

    Args:
        file: safetensors; what PEFT writes needs the adapter_config.json beside it. It may adapt other networks too.
        network: the UNet or the text encoder that the file was made for, without adapters.
        part: which of the networks of a checkpoint it is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, holds a weight that is not understood, or does not fit the network.
    """
    file = Path(file)
    stored, metadata = read_adapter_file(file, part)
    if part == "unet":
        check_family(file, stored, network)
    peft = peft_settings(file, stored, metadata, part)
    params, layers = flatten_dict(network.params), layers_by_name(network, ("kernel", "scale"), part)
    found: dict[tuple, dict[str, str]] = {}  # the stored names of each layer, by their endings
    for name in stored:
        ending = _ending_of(name)
        path = layers.get(name.removesuffix(ending)) if ending else None
        if path is None:
            raise ValueError(
                f"{file}: weight {name!r} has no place in the {WORDS[part]}; expected adapters of its layers of the "
                "kinds LoRA, DoRA, LoHa, LoKr, IA3, GLoRA, full differences and norms"
            )
        names = found.setdefault(path, {})
        if other := names.get(FACTORS[ending]):
            raise ValueError(
                f"{file}: weights {other!r} and {name!r} are the same of layer {'.'.join(map(str, path))!r}, expected "
                "one of them: download or export the file again"
            )
        names[FACTORS[ending]] = name
    folded = dict(params)
    dora = next((names[end] for names in found.values() for end in MAGNITUDES if end in names), None)
    for path, names in found.items():
        if dora is not None and names.keys().isdisjoint(MAGNITUDES) and any(re.match(LOW_RANK, end) for end in names):
            missing = _beside(names, _ending_of(dora).removeprefix("."))
            raise ValueError(
                f"{file}: no weight {missing!r}, expected in a file that has {dora!r}; the file is incomplete: "
                "download or export it again"
            )
        parts = {ending: stored[name].astype(np.float32) for ending, name in names.items()}
        if peft is not None and "lora_down.weight" in parts:
            rank = len(parts["lora_down.weight"])
            layer = ".".join(map(str, path))
            parts.setdefault("alpha", np.asarray(peft.alpha_of(layer, rank, names["lora_down.weight"])))
        try:
            _fold(folded, path, parts)
        except KeyError as error:
            raise ValueError(
                f"{file}: no weight {_beside(names, error.args[0])!r}, expected with {next(iter(names.values()))!r}; "
                "the file is incomplete: download or export it again"
            ) from error
        except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
            raise ValueError(
                f"{file}: weight {next(iter(names.values()))!r} and those with it do not fit layer "
                f"{'.'.join(map(str, path))!r} ({error}); the file is damaged or was made for another network"
            ) from error
        if parts:
            raise ValueError(f"{file}: weight {names[next(iter(parts))]!r} is none that the others of its layer have")
    return network._replace(params=unflatten_dict(folded))


def _ending_of(name: str) -> str:
    """One of `FACTORS`; "" for other names."""
    return next(filter(name.endswith, FACTORS), "")


def _beside(names: dict[str, str], missing: str) -> str:
    """The name in the file of a weight that it lacks, as those of the same layer have it."""
    name = next(iter(names.values()))
    of_peft = any(re.search(r"\.lora_[AB]\.", stored) for stored in names.values())
    theirs = {FACTORS[f".{ending}"]: ending for ending in ("lora_A.weight", "lora_B.weight")} if of_peft else {}
    return f"{name.removesuffix(_ending_of(name))}.{theirs.get(missing, missing)}"


def _fold(params: dict[tuple, Any], path: tuple, parts: Parts) -> None:
    """Replaces the weight and the bias of a layer; takes out of `parts` what it has used."""
    leaf = "kernel" if (*path, "kernel") in params else "scale"
    ours = np.asarray(params[*path, leaf], np.float32)
    axes = KERNEL_AXES.get(ours.ndim, tuple(range(ours.ndim))) if leaf == "kernel" else tuple(range(ours.ndim))
    weight = ours.transpose(axes)
    changed = weight
    for kind, delta in KINDS.items():
        if any(re.fullmatch(kind, part) for part in parts):
            added = delta(weight, parts)
            if (added.shape[:1], added.size) != (weight.shape[:1], weight.size):
                raise ValueError(f"shape {list(added.shape)}, expected {list(weight.shape)}")
            changed = changed + added.reshape(weight.shape)
            break
    if "dora_scale" in parts:  # of inputs, in older files, or of outputs
        magnitude = parts.pop("dora_scale")
        changed = _normalised(changed, magnitude, axis=0 if magnitude.shape[0] == len(weight) else 1)
    elif "lora_magnitude_vector" in parts:
        changed = _normalised(changed, parts.pop("lora_magnitude_vector"), axis=0)
    for ending in ("diff_b", "b_norm"):
        if ending in parts:
            bias = params[*path, "bias"]
            params[*path, "bias"] = bias + jnp.asarray(parts.pop(ending).reshape(bias.shape), bias.dtype)
    if not np.isfinite(changed).all():
        raise ValueError("its weights are too large for float32")
    params[*path, leaf] = jnp.asarray(changed.transpose(np.argsort(axes)), params[*path, leaf].dtype)


def _normalised(weight: np.ndarray, magnitude: np.ndarray, axis: int) -> np.ndarray:
    """DoRA: `m W / |W|`, a magnitude m and a norm for each output (axis 0) or input (axis 1)."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    norm = np.sqrt(np.square(weight).sum(others, keepdims=True)) + np.finfo(np.float32).eps
    return weight * (magnitude.reshape(norm.shape) / norm)


# ----------------------------------------------------------------------------------------------------------------------
# Deltas


def _scale(parts: Parts, rank: int) -> np.float32:
    alpha = parts.pop("alpha", None)
    return np.float32(1 if alpha is None or not alpha.any() else alpha.reshape(()) / rank)


def _with_core(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`sum_mn M_mn.. a_mi b_nj` of a core M `[m, n, h, w]`."""
    if core.shape[:2] != (len(a), len(b)):  # NumPy would repeat what has one row
        raise ValueError(f"a core of shape {list(core.shape)} with {len(a)} and {len(b)} rows")
    return np.einsum("mn...,mi,nj->ij...", core, a, b)


def _lora(weight: np.ndarray, parts: Parts) -> np.ndarray:
    """`s U D`; with a core M (Tucker) `s sum_mn M_mn.. U_im D_nj`."""
    up, down, middle = parts.pop("lora_up.weight"), parts.pop("lora_down.weight"), parts.pop("lora_mid.weight", None)
    rank, up = len(down), up.reshape(len(up), -1)
    scale = _scale(parts, rank)
    if middle is not None:
        return scale * _with_core(middle, up.T, down.reshape(rank, -1))
    return scale * (up @ down.reshape(rank, -1))


def _loha(weight: np.ndarray, parts: Parts) -> np.ndarray:
    """LoHa: `s (A_1 B_1) * (A_2 B_2)`, elementwise; each product perhaps with a core."""
    rank = parts["hada_w1_b"].shape[0]
    factors = []
    for i in (1, 2):
        a, b, core = parts.pop(f"hada_w{i}_a"), parts.pop(f"hada_w{i}_b"), parts.pop(f"hada_t{i}", None)
        factors.append(a @ b if core is None else _with_core(core, a, b))
    return _scale(parts, rank) * factors[0] * factors[1]


def _lokr(weight: np.ndarray, parts: Parts) -> np.ndarray:
    """LoKr: `s C kron D`; each whole or a product, D perhaps with a core. Whole ones have s = 1."""
    whole = "lokr_w1" in parts and "lokr_w2" in parts
    rank = next((parts[name].shape[1] for name in ("lokr_w1_a",) if name in parts), 1)
    if "lokr_w2_b" in parts:
        rank = len(parts["lokr_w2_b"])
    first = parts.pop("lokr_w1") if "lokr_w1" in parts else parts.pop("lokr_w1_a") @ parts.pop("lokr_w1_b")
    if "lokr_w2" in parts:
        second = parts.pop("lokr_w2")
    else:
        a, b, core = parts.pop("lokr_w2_a"), parts.pop("lokr_w2_b"), parts.pop("lokr_t2", None)
        second = a @ b if core is None else _with_core(core, a, b)
    size = [n // m for n, m in zip(weight.shape[:2], first.shape, strict=True)]
    second = second.reshape(*size, *weight.shape[2:])
    scale = _scale(parts, rank)
    product = np.einsum("ab,cd...->acbd...", first, second).reshape(weight.shape)
    return product if whole else scale * product


def _ia3(weight: np.ndarray, parts: Parts) -> np.ndarray:
    """IA3: `W` times a vector over its inputs or outputs."""
    vector, on_input = parts.pop("weight"), bool(parts.pop("on_input").reshape(()))
    shape = (1, -1) if on_input else (-1, 1)
    return weight * vector.reshape(*shape, *(1 for _ in weight.shape[2:]))


def _glora(weight: np.ndarray, parts: Parts) -> np.ndarray:
    """GLoRA: `s (W A_1 A_2 + B_1 B_2)`; B perhaps with a core."""
    a1, a2, b1, b2 = (parts.pop(f"{name}.weight") for name in ("a1", "a2", "b1", "b2"))
    core, rank = parts.pop("bm.weight", None), len(b2)
    inputs = a1.reshape(len(a1), -1) @ a2.reshape(len(a2), -1)
    b1 = b1.reshape(len(b1), -1)
    b2 = b2.reshape(rank, -1)
    added = b1 @ b2 if core is None else _with_core(core, b1.T, b2)
    return _scale(parts, rank) * (np.einsum("oi...,ij->oj...", weight, inputs) + added.reshape(weight.shape))


def _whole(name: str) -> Callable[[np.ndarray, Parts], np.ndarray]:
    return lambda weight, parts: parts.pop(name)


# By patterns of the endings of their names.
KINDS: dict[str, Callable[[np.ndarray, Parts], np.ndarray]] = {
    r"lora_(up|down|mid)\.weight": _lora,
    r"hada_.*": _loha,
    r"lokr_.*": _lokr,
    r"on_input": _ia3,
    r"[ab][12m]\.weight": _glora,
    r"diff": _whole("diff"),
    r"w_norm": _whole("w_norm"),
}
