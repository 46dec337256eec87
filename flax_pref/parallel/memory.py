"""The memory that a program takes of the devices of a mesh."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh


def budget(mesh: Mesh, held: Mapping[str, Any], memory: Any, limit: int | None = None) -> str:
    """A table of what the devices of a mesh hold.

    Args:
        mesh: of the run.
        held: by name, pytrees of arrays or of `jax.ShapeDtypeStruct`; without a sharding, a leaf is on every device.
            What lies there between steps; gradients are among the temporary memory.
        memory: `memory_analysis()` of the compiled step, or None where the platform has none.
        limit: bytes that a device has, see `memory_limit`; None: not known.

    Returns:
        a line on the mesh, a table of numbers and bytes, and if they are more than the limit a line that warns.
    """
    rows = [("", "numbers", "in all", "per device")]
    taken = taken_bytes(held, memory)
    for name, tree in held.items():
        leaves = jax.tree.leaves(tree)
        numbers, in_all = sum(math.prod(x.shape) for x in leaves), sum(map(_bytes, leaves))
        rows.append((name, f"{numbers:,}", size_text(in_all), size_text(taken[name])))
    rows += [(name, "", "", size_text(size)) for name, size in taken.items() if name not in held and size]
    total = sum(taken.values())
    rows.append(("total", "", "", size_text(total)))
    lines = [_mesh_line(mesh) + ("" if limit is None else f", {size_text(limit)} each"), aligned(rows)]
    return "\n".join([*lines, *_shortage(total, limit)])


def total_text(held: Mapping[str, Any], memory: Any, limit: int | None = None) -> str:
    """What a device holds in all, and if it is more than the limit a line that warns; arguments as in `budget`."""
    total = sum(taken_bytes(held, memory).values())
    return "\n".join([f"{size_text(total)} per device", *_shortage(total, limit)])


def _shortage(total: int, limit: int | None) -> list[str]:
    if limit is None or total <= limit:
        return []
    return [
        f"warning: {size_text(total - limit)} more than a device has; a larger fsdp axis, fewer pairs per device or "
        "lower precision need less"
    ]


def taken_bytes(held: Mapping[str, Any], memory: Any) -> dict[str, int]:
    """Bytes of one device by name: of what is held, and what the program takes beside it; arguments as in `budget`."""
    taken = {name: sum(map(_bytes_per_device, jax.tree.leaves(tree))) for name, tree in held.items()}
    if memory is None:
        return taken
    # Arguments may be larger than their numbers; results that take the place of arguments are no others.
    temporary = max(0, memory.argument_size_in_bytes - sum(taken.values())) + memory.temp_size_in_bytes
    temporary += max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    return {**taken, "activations and other": temporary, "program": memory.generated_code_size_in_bytes}


def memory_limit(mesh: Mesh) -> int | None:
    """Bytes that JAX may use of a device; None where that is not known, as on CPUs."""
    stats = mesh.local_devices[0].memory_stats() or {}
    return stats.get("bytes_limit")


def _mesh_line(mesh: Mesh) -> str:
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    hosts = len({device.process_index for device in mesh.devices.flat})
    kind = mesh.devices.flat[0].device_kind
    return f"mesh {axes}: {mesh.size} {kind} on {hosts} host{'s' if hosts > 1 else ''}"


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _bytes_per_device(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column to the left, others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join((f"{name:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(cells, others, strict=True))))
        for name, *cells in rows
    )


def size_text(count: int) -> str:
    """Bytes with a unit."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
