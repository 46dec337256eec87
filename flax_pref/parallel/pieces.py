"""Weights in pieces: each device keeps one of a weight, and gathers the whole where it uses it.

For networks that are not trained, as those of rewards, and see images of its own on each device. A device computes what
it would with all weights to itself, to the last bit, but keeps only its share of them, and while it computes those of
a few layers (arXiv:1910.02054, stage 3). What is trained divides layers themselves, see `parallel.sharding`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from flax_pref.parallel.sharding import MIN_SIZE

AXES = ("fsdp", "tensor")


def piece_spec(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Over "fsdp" and "tensor" together, in the largest dimension that they divide; small weights stay whole."""
    axes = tuple(axis for axis in AXES if mesh.shape.get(axis, 1) > 1)
    count = math.prod(mesh.shape[axis] for axis in axes)
    divisible = [d for d, size in enumerate(shape) if size % count == 0]
    if not axes or not divisible or math.prod(shape) < MIN_SIZE:
        return PartitionSpec()
    dimension = max(divisible, key=lambda d: shape[d])
    return PartitionSpec(*[None] * dimension, axes)


def piece_specs(weights: Any, mesh: Mesh | AbstractMesh) -> Any:
    """`piece_spec` of each leaf of a pytree, arrays or their shapes."""
    return jax.tree.map(lambda leaf: piece_spec(leaf.shape, mesh), weights)


def in_pieces(mesh: Mesh) -> Callable[[tuple, tuple[int, ...]], NamedSharding]:
    """Where each weight of a network goes when it is read; see `checkpoints.weights.Placement`."""
    return lambda path, shape: NamedSharding(mesh, piece_spec(shape, mesh))


def put_in_pieces(weights: Any, mesh: Mesh) -> Any:
    """A pytree of weights on the devices of a mesh; those that lie so already stay where they are."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), piece_specs(weights, mesh))
    return jax.device_put(weights, shardings)


def with_gathered(function: Callable, pieces: Any, specs: Any, *arrays: Any) -> Any:
    """`function(weights, *arrays)`, to be called inside of `jax.shard_map`.

    Its backward pass gathers weights again, and keeps all else that it would keep.

    Args:
        function: of whole weights.
        pieces: of these weights, those of this device.
        specs: of the weights, by `piece_specs`.
        arrays: pytrees.
    """
    if not any(len(spec) for spec in jax.tree.leaves(specs)):
        return function(pieces, *arrays)

    def gather(piece, spec):
        for dimension, axes in enumerate(spec):
            if axes is not None:
                piece = jax.lax.all_gather(piece, axes, axis=dimension, tiled=True)
        return piece

    def gathering(pieces, *arrays):
        return function(jax.tree.map(gather, pieces, specs), *arrays)

    return jax.checkpoint(gathering, policy=lambda primitive, *_, **__: primitive.name != "all_gather")(pieces, *arrays)
