"""TPU slices by name, with what their chips can do, on machines that have none: to compile for, not to run on.

The compiler is the one that TPU machines have, in the package libtpu.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from flax_pref.compilation import share_code
from flax_pref.config import UserError
from flax_pref.parallel.mesh import Device
from flax_pref.parallel.peak import GENERATIONS, peak_flops


class Chip(NamedTuple):
    """What JAX calls a device: a chip, but of tpu7x one of its two cores.

    Attributes:
        hbm: bytes that a program may use; what the compiler (libtpu 0.0.42) names when one needs more.
        bandwidth: of that memory, bytes/s.
        links: bytes/s that it sends to its neighbours, over all of its links together.
        clock: Hz, by which cycles become seconds: the maker's peak over the multiplications of a cycle.
        vector: bytes that its vector units take and give in a cycle; after the compiler's own estimates for blocks of
            SDXL on v5e, v5p and v6e, of v4 and tpu7x only as of their kin.
        cores: of a device, which share its programs.
        mxu: side of a matrix unit.
    """

    hbm: int
    bandwidth: float
    links: float
    clock: float
    vector: int
    cores: int
    mxu: int


GIB = 2**30
# Bandwidths: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x (half a chip's); of links half of both directions.
# Clocks: the maker's peak over the multiplications of a cycle, 4 x 128 x 128 per core up to v5p and 4 x 256 x 256 from
# v6e on; with fewer, the compiler's estimate of a product of 8192 x 8192 matrices would be above the peak.
CHIPS = {
    "v4": Chip(int(30.75 * GIB), 1228e9, 300e9, 1.05e9, vector=500, cores=2, mxu=128),
    "v5e": Chip(int(15.75 * GIB), 819e9, 200e9, 1.50e9, vector=250, cores=1, mxu=128),
    "v5p": Chip(int(95.74 * GIB), 2765e9, 600e9, 1.75e9, vector=500, cores=2, mxu=128),
    "v6e": Chip(int(31.25 * GIB), 1640e9, 400e9, 1.75e9, vector=500, cores=1, mxu=256),
    "tpu7x": Chip(int(94.75 * GIB), 3690e9, 300e9, 2.20e9, vector=500, cores=1, mxu=256),
}
# Without it the devices of a v4 would be cores, which share no memory.
OPTIONS = {"v4": {"chip_config_name": "megacore"}}
EXAMPLES = "v5e:1x1, v5e:2x2, v5e:16x16, v6e:16x16, v5p:4x4x4, v4:4x4x4 or tpu7x:4x4x4"


class Topology(NamedTuple):
    """A slice.

    Attributes:
        name: such as v5e:16x16.
        devices: to make meshes of.
        chip: what each can do.
        peak: FLOP/s of each in bfloat16.
    """

    name: str
    devices: Sequence[Device]
    chip: Chip
    peak: float


def chips_of(name: str) -> int:
    """How many chips the slice of a name has, whether there is such a slice or not.

    Raises:
        UserError: it is no such name.
    """
    if not re.fullmatch(rf"({'|'.join(CHIPS)}):[1-9]\d*(x[1-9]\d*)+", name):
        raise UserError(f"--topology {name}: expected one of {', '.join(CHIPS)} and its size, such as {EXAMPLES}")
    return math.prod(int(size) for size in name.partition(":")[2].split("x"))


def topology(name: str) -> Topology:
    """A slice by its name; from then on JAX itself computes on the CPU, and keeps nothing that it compiles.

    Raises:
        UserError: libtpu is not installed, or there is no such slice.
    """
    chips = chips_of(name)
    kind = name.partition(":")[0]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, the compiler of TPUs, is not installed: pip install -e '.[tpu]' installs it")
    # Said before libtpu is loaded, for else it looks for the machine's TPUs, and asks a metadata server for its name.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any: slices are made by their own names
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    share_code()
    jax.config.update("jax_platforms", "cpu")
    # What is compiled for a slice that is not there cannot be read from the cache again.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    options = OPTIONS.get(kind, {}) | ({"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {})  # else 2 x 2
    try:
        devices = topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].partition(": ")[2]
        raise UserError(f"--topology {name}: there is no such slice ({reason}); expected e.g. {EXAMPLES}") from error
    peak, reason = peak_flops(devices[0].device_kind, "bfloat16")
    if peak is None:
        raise UserError(f"--topology {name}: {reason}")
    return Topology(name, devices, CHIPS[kind], peak)


def running_on(devices: Sequence[Device]) -> Topology | None:
    """The slice that programs run on, to plan what was compiled for it; None where its chips have no plans."""
    kind = next((name for pattern, name in GENERATIONS.items() if re.search(pattern, devices[0].device_kind)), None)
    peak, _ = peak_flops(devices[0].device_kind, "bfloat16")
    return (
        None if kind is None or peak is None else Topology(f"{kind}, {len(devices)} chips", devices, CHIPS[kind], peak)
    )
