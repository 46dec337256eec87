"""What a program is being compiled for, where the fastest way to compute something depends on it."""

import math

import jax
from jax.sharding import AxisType

# Bytes that stay in a CPU's cache between two operations; what a batch has more of is cheaper image by image.
CACHED = 24 * 2**20


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the mesh in use (`jax.set_mesh`), else of JAX's default device.

    The mesh comes first because programs can be compiled for TPUs on a machine that has none.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


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
