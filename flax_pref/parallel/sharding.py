"""How parameters, and what an optimizer keeps of each, are divided over a mesh.

The tensor axis divides layers as in Megatron-LM (arXiv:1909.08053, section 3): of two layers in a row the first by its
outputs and the second by its inputs, so that devices send each other one sum for the two. The fsdp axis divides what is
large wherever it can, to save memory (arXiv:1910.02054, stage 3): devices gather a layer when they come to it.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from flax_pref.models.unet import UNetConfig

MIN_SIZE = 2**18  # elements from which fsdp divides a leaf: below, to gather it costs more than it saves

OUTPUTS = {"kernel": -1, "bias": -1, "scale": -1, "lora_b": -1}  # the dimension of every leaf that has the outputs
INPUTS = {"kernel": -2, "lora_a": -2}
TENSOR = (
    # layers of the UNet, what is divided, whether in whole heads
    (r"attn\d\.to_[qkv]", OUTPUTS, True),
    (r"attn\d\.to_out\.0", INPUTS, True),
    (r"ff\.net\.0\.proj", OUTPUTS, False),
    (r"ff\.net\.2", INPUTS, False),
    (r"resnets\.\d+\.(conv1|time_emb_proj|norm2)", OUTPUTS, False),
    (r"resnets\.\d+\.conv2", INPUTS, False),
)


def partition(
    path: str, shape: tuple[int, ...], mesh: Mesh, *, heads: Mapping[int, int] | None = None, min_size: int = MIN_SIZE
) -> PartitionSpec:
    """Over which axes of the mesh each dimension of a parameter is divided; what cannot be divided stays whole.

    Args:
        path: of the parameter, `down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.kernel`, after any prefix.
        shape: of a kernel `[in, out]` or `[kh, kw, in, out]`, `lora_a [M, ..., in, r]`, `lora_b [M, r, out]`, or other.
        mesh: its axes "fsdp" and "tensor" divide parameters.
        heads: see `attention_heads`; for meshes with a tensor axis.
        min_size: elements from which fsdp divides a leaf.

    Raises:
        ValueError: the mesh has a tensor axis, and the attention a number of channels that `heads` does not have.
    """
    axes: list[str | None] = [None] * len(shape)
    tensor, fsdp = (mesh.shape.get(axis, 1) for axis in ("tensor", "fsdp"))
    if tensor > 1 and (dimension := _divided_by_tensor(path, shape, tensor, heads or {})) is not None:
        axes[dimension] = "tensor"
    free = [d for d, size in enumerate(shape) if axes[d] is None and size % fsdp == 0]
    if fsdp > 1 and free and math.prod(shape) >= min_size:
        axes[max(free, key=lambda d: shape[d])] = "fsdp"
    return PartitionSpec(*axes)


def _divided_by_tensor(path: str, shape: tuple[int, ...], tensor: int, heads: Mapping[int, int]) -> int | None:
    layer, _, leaf = path.rpartition(".")
    for pattern, dimensions, in_heads in TENSOR:
        if re.search(rf"(^|\.){pattern}$", layer) and leaf in dimensions:
            size = shape[dimensions[leaf]]
            if in_heads and size not in heads:
                raise ValueError(
                    f"sharding: {path} has {size} channels, expected one of heads={dict(heads)}: to divide attention "
                    "over the tensor axis, pass heads=attention_heads(config) of this network"
                )
            return None if (heads[size] if in_heads else size) % tensor else dimensions[leaf]
    return None


def attention_heads(config: UNetConfig) -> dict[int, int]:
    """A number that divides the number of attention heads, for each number of channels of the network."""
    heads: dict[int, int] = {}
    for channels, own in zip(config.block_out_channels, config.per_block("attention_head_dim"), strict=True):
        heads[channels] = math.gcd(own, heads.get(channels, 0))
    return heads


def shardings(params: Any, mesh: Mesh, *, heads: Mapping[int, int] | None = None, min_size: int = MIN_SIZE) -> Any:
    """A `NamedSharding` for each leaf of nested parameters, arrays or their `ShapeDtypeStruct`; see `partition`."""

    def sharding(path, leaf):
        return NamedSharding(mesh, partition(_name(path), leaf.shape, mesh, heads=heads, min_size=min_size))

    return jax.tree.map_with_path(sharding, params)


def like_params(
    state: Any, params: Any, mesh: Mesh, *, heads: Mapping[int, int] | None = None, min_size: int = MIN_SIZE
) -> Any:
    """A `NamedSharding` for each leaf of what holds copies of parameters: optimizer states, averages, train states.

    To be given to `jax.jit(tx.init, out_shardings=...)`: moments that begin at zero depend on no parameter, so that
    without it they would begin whole on one device.

    Args:
        state: pytree of arrays or their shapes, `jax.eval_shape(tx.init, params)`. A leaf whose path ends in that of a
            parameter gets its sharding if it has its shape; if it lacks one dimension, as Adafactor's moments of rows
            and columns, that sharding without this dimension. All others are whole on every device.
        params: nested parameters or their shapes.
        mesh, heads, min_size: see `partition`.

    Raises:
        ValueError: see `partition`.
    """
    known = {
        _name(path): (leaf.shape, partition(_name(path), leaf.shape, mesh, heads=heads, min_size=min_size))
        for path, leaf in jax.tree.leaves_with_path(params)
    }

    def sharding(path, leaf):
        names = _name(path).split(".")
        ends = (".".join(names[start:]) for start in range(len(names)))
        shape, spec = next((known[end] for end in ends if end in known), ((), PartitionSpec()))
        if leaf.shape == shape:
            return NamedSharding(mesh, spec)
        missing = [d for d in range(len(shape)) if (*shape[:d], *shape[d + 1 :]) == leaf.shape]
        if not missing:
            return NamedSharding(mesh, PartitionSpec())
        # Of two dimensions of one size the columns lack the first: it is that of the rows.
        lost = missing[0] if "v_col" in names else missing[-1]
        return NamedSharding(mesh, PartitionSpec(*spec[:lost], *spec[lost + 1 :]))

    return jax.tree.map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays `[B, ...]`: images are divided over those of the axes "data" and "fsdp" that the mesh has."""
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)))


def _name(path: tuple) -> str:
    return keystr(path, simple=True, separator=".")
