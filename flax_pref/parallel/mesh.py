"""Meshes of devices from a line of text."""

import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from flax_pref.models.bank import AXIS

AXES = ("data", AXIS)


def make_mesh(text: str, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh from text such as `data=-1` or `network=3,data=-1`, where -1 takes the devices that are left.

    Args:
        text: sizes of axes; "data" divides the images of a batch, "network" holds the networks of a rule side by side.
        devices: to be shared out, all of them.

    Raises:
        ValueError: the text is no such list, or the sizes do not make up the devices.
    """
    expected = f"expected sizes of {' and '.join(AXES)} such as data=-1 or network=3,data=-1"
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\w+)=(-1|[1-9]\d*)", part.strip())
        if not match or match[1] not in AXES or match[1] in sizes:
            raise ValueError(f"mesh {text!r}: {part.strip()!r} is not understood; {expected}")
        sizes[match[1]] = int(match[2])
    open_axes = [name for name, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size > 0)
    if len(open_axes) == 1 and len(devices) % given == 0:
        sizes[open_axes[0]] = len(devices) // given
    if math.prod(sizes.values()) != len(devices) or -1 in sizes.values():
        raise ValueError(f"mesh {text!r}: does not make up {len(devices)} devices; {expected}")
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), tuple(sizes))
