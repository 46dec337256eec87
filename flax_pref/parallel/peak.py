"""What a program asks of a device, and what the device could do at best."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from flax_pref.parallel.mesh import Device

# Generations of TPUs by the kinds that JAX gives to their devices; the first pattern that is found in one counts.
GENERATIONS = {
    r"TPU v4$": "v4",
    r"TPU v5 lite|TPU v5e": "v5e",
    r"TPU v5": "v5p",
    r"TPU v6": "v6e",
    r"TPU ?(v7|7x)": "tpu7x",
}
# Dense FLOP/s in bfloat16 of one device of JAX, after its maker; of tpu7x half a chip's, which is two devices.
TPU_PEAKS = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12, "tpu7x": 2307e12 / 2}
# By patterns, of which the first that is found in a device's kind counts.
PEAKS = {
    **{pattern: TPU_PEAKS[generation] for pattern, generation in GENERATIONS.items()},
    r"H100 PCIe": 756e12,
    r"H100|H200": 989e12,
    r"A100": 312e12,
    r"L4\b": 121e12,
}


def step_flops(program: Any, *arguments: Any) -> float:
    """Floating-point operations of one call on all devices, as XLA counts them before it optimises.

    XLA counts the body of a loop once, which is too little of the loops over blocks that CPUs get, and kernels not at
    all. So the program is lowered for a device that has neither. Not even so it counts: all but one pass of loops of
    the program's own, such as accumulation; attention kernels that were asked for by name. What `jax.checkpoint`
    computes again it counts again.

    Args:
        program: jitted, of any shardings; it is neither compiled nor run.
        *arguments: of the program, pytrees of arrays or of `jax.ShapeDtypeStruct`.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    device = AbstractDevice(device_kind="other", num_cores=None, platform="other")
    # The axes in use stay, for the program may name them.
    axes = dict(jax.sharding.get_abstract_mesh().shape) or {"data": 1}
    types = (AxisType.Auto,) * len(axes)
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return program.lower(*shapes).cost_analysis()["flops"]


def compile_and_count(lowered: Any, program: Any, *arguments: Any) -> tuple[Any, float]:
    """A program for this machine, and its `step_flops`.

    They are counted while it is compiled: the one is work of Python, for a second trace, and the other of XLA.

    Args:
        lowered: what `program.lower(*arguments)` gives.
        program, *arguments: see `step_flops`.
    """
    with ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(lowered.compile)
        flops = step_flops(program, *arguments)
        return compiling.result(), flops


def peak_of(device: Device, dtype: str) -> tuple[float | None, str]:
    """The peak of a device in FLOP/s and what it is, or None and why there is none.

    Args:
        device: of this process. CPUs are measured, which takes about a second; devices that share a CPU share its peak.
        dtype: of the products.
    """
    if device.platform == "cpu":
        return measured_peak() / jax.local_device_count(), "measured"
    return peak_flops(device.device_kind, dtype)


def peak_flops(device_kind: str, dtype: str) -> tuple[float | None, str]:
    """The peak of an accelerator in FLOP/s and what it is, or None and why there is none."""
    peak = next((peak for pattern, peak in PEAKS.items() if re.search(pattern, device_kind)), None)
    if peak is None:
        return None, f"no peak of {device_kind} is known here"
    if dtype != "bfloat16" and (dtype != "float16" or "TPU" in device_kind):
        return None, f"only peaks of 16-bit products are known here, this is {dtype}"
    return peak, "that of the maker for dense bfloat16"


def measured_peak(seconds: float = 0.05, dtype: str = "float32") -> float:
    """FLOP/s of the best of a few matrix products: what a device reaches, with all else that runs on it.

    Args:
        seconds: their size doubles, from 256 up, until one takes as long.
        dtype: of the matrices.
    """
    multiply, best, size, took = jax.jit(jnp.matmul), 0.0, 256, 0.0
    while True:
        square = jnp.full((size, size), 0.5, dtype)
        multiply(square, square).block_until_ready()
        for _ in range(2):
            started = time.perf_counter()
            multiply(square, square).block_until_ready()
            took = time.perf_counter() - started
            best = max(best, 2 * size**3 / took)
        if took >= seconds:
            return best
        size *= 2


def measured_bandwidth(size: int = 2**28) -> float:
    """Bytes/s that a device reads and writes at best while it copies an array of `size` bytes."""
    array, best = jnp.zeros(size // 4, jnp.float32), 0.0
    copy = jax.jit(jnp.negative)  # what only copies, XLA may leave out
    copy(array).block_until_ready()
    for _ in range(5):
        started = time.perf_counter()
        copy(array).block_until_ready()
        best = max(best, 2 * array.nbytes / (time.perf_counter() - started))
    return best
