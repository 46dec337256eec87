"""Meshes of devices from a line of text."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from flax_pref.models.bank import AXIS

if TYPE_CHECKING:
    from jaxlib._jax import Device  # `jax.Device` is a variable, which no annotation may be
else:
    from jax import Device

AXES = ("data", AXIS)
TRAINING_AXES = ("data", "fsdp", "tensor")


def make_mesh(text: str, devices: Sequence[Device], axes: Sequence[str] = AXES) -> Mesh:
    """A mesh from text such as `data=-1` or `network=3,data=-1`, where -1 takes the devices that are left.

    Args:
        text: sizes of axes, in any order; "data" divides the images of a batch, "network" holds the networks of a rule
            side by side; "fsdp" divides images and parameters, "tensor" layers, see `parallel.sharding`.
        devices: to be shared out, all of them; those of all hosts are `jax.devices()`.
        axes: that the program has a use for, those that send the most last: devices that are neighbours on them are
            neighbours in the machine, and the first goes across hosts.

    Raises:
        ValueError: the text is no such list, or the sizes do not make up the devices.
    """
    expected = f"expected sizes of {', '.join(axes[:-1])} and {axes[-1]} such as data=-1 or {axes[1]}=2,data=-1"
    given: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\w+)=(-1|[1-9]\d*)", part.strip())
        if not match or match[1] not in axes or match[1] in given:
            raise ValueError(f"mesh {text!r}: {part.strip()!r} is not understood; {expected}")
        given[match[1]] = int(match[2])
    sizes = {axis: given[axis] for axis in axes if axis in given}
    open_axes = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size > 0)
    if len(open_axes) == 1 and len(devices) % known == 0:
        sizes[open_axes[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices) or -1 in sizes.values():
        raise ValueError(f"mesh {text!r}: does not make up {len(devices)} devices; {expected}")
    return Mesh(arranged(tuple(sizes.values()), devices), tuple(sizes))


def arranged(sizes: tuple[int, ...], devices: Sequence[Device]) -> np.ndarray:
    """Devices as an array of these sizes; those near each other on the last axes are so in the machine.

    Raises:
        ValueError: the first axis cannot be divided between the slices of several TPUs.
    """
    slices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    if len(slices) <= 1:
        # An axis may take a part of a dimension of a TPU's torus, or else few sizes could be had.
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    first, *others = sizes
    if first % len(slices):
        raise ValueError(
            f"mesh of {sizes}: the devices are in {len(slices)} slices with a slow network between them, expected a "
            f"first axis of a multiple of {len(slices)}: make data larger and the other axes smaller"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (first // len(slices), *others),
        (len(slices), *(1 for _ in others)),
        devices,
        allow_split_physical_axes=True,
    )
