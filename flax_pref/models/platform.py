"""What a program is being compiled for, where the fastest way to compute something depends on it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

# Bytes that stay in a CPU's cache between two operations; what a batch has more of is cheaper image by image.
CACHED = 24 * 2**20


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the mesh in use (`jax.set_mesh`), else of JAX's default device.

    The mesh comes first because programs can be compiled for TPUs on a machine that has none.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """Kind of the device in JAX's words, such as "TPU v6 lite"; of the same device as `platform`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def default_dtype(dtype: str) -> str:
    """What networks compute in where "auto" is asked for: bfloat16 on TPUs and GPUs, float32 on CPUs."""
    return dtype if dtype != "auto" else "float32" if platform() == "cpu" else "bfloat16"


def per_device(count: int) -> int:
    """A device's share of a batch that the axes "data" and "fsdp" of the mesh in use (`jax.set_mesh`) divide.

    Inside `jax.shard_map` a batch is that of one device already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    dividing = [name for name, kind in axes if name in ("data", "fsdp") and kind != AxisType.Manual]
    return count // math.prod(mesh.shape[name] for name in dividing)


def weights_divided() -> bool:
    """Whether the mesh in use (`jax.set_mesh`) divides weights, over "fsdp" or "tensor"."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[name] > 1 for name in ("fsdp", "tensor") if name in mesh.shape)


def unless_differentiated(inference: Callable, training: Callable) -> Callable:
    """One of two functions that compute the same: `training` where a gradient is asked for, else `inference`.

    What they use must be arguments, in trees of arrays of real numbers.
    """
    chosen = jax.custom_vjp(inference)
    chosen.defvjp(lambda *arguments: jax.vjp(training, *arguments), lambda backward, gradient: backward(gradient))
    return chosen


def in_parts(function: Callable, arguments: tuple[Any, ...], parts: int) -> jax.Array:
    """Applies a function to equal parts of a batch, one after another; each has equally many images of every device.

    Args:
        function: gives an array `[P, ...]` for arguments of P images.
        arguments: trees of arrays `[B, ...]`.
        parts: their number, of which each device's share of B is a multiple.

    Returns:
        `[B, ...]`, in the order of the batch.
    """

    def split(x: jax.Array) -> jax.Array:
        images = x.reshape(len(x) // per_device(len(x)), parts, -1, *x.shape[1:])
        return jnp.moveaxis(images, 1, 0).reshape(parts, -1, *x.shape[1:])

    together = jax.lax.map(lambda part: function(*part), jax.tree.map(split, arguments))
    batch, shape = together.shape[0] * together.shape[1], together.shape[2:]
    images = together.reshape(parts, batch // per_device(batch), -1, *shape)
    return jnp.moveaxis(images, 0, 1).reshape(batch, *shape)
