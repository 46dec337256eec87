"""What benches share: command line, random networks and inputs, timing in turns, memory."""

import itertools
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from numpy.typing import DTypeLike

from flax_pref.checkpoints.weights import abstract_network
from flax_pref.config import parse_flags
from flax_pref.diffusion.conditioning import size_ids
from flax_pref.files import read_json
from flax_pref.models.network import Network
from flax_pref.models.presets import FAMILIES, Family
from flax_pref.models.unet import UNetConfig
from flax_pref.parallel.peak import measured_bandwidth, measured_peak

DRAWN = 1_048_583  # numbers of random weights, odd, so that rows of a matrix begin at different ones


def run_bench(benches: Mapping[type, Callable[[Any], dict]], arguments: list[str]) -> None:
    """Runs the bench that the arguments name, prints its figures, and writes them where its field `json` says.

    Args:
        benches: for each kind of flags, named as on the command line with a capital, what gives the figures.
        arguments: `["data", "--json", "data.json"]`.
    """
    kinds = {kind.__name__.lower(): kind() for kind in benches}
    bench = parse_flags(arguments, tyro.extras.subcommand_type_from_defaults(kinds))
    figures = benches[type(bench)](bench)
    print(json.dumps(figures, indent=2))
    if bench.json is not None:
        bench.json.parent.mkdir(parents=True, exist_ok=True)
        bench.json.write_text(json.dumps(figures, indent=2) + "\n")


def random_network(kind: str, config, dtype: DTypeLike = "float32") -> Network:
    """A network with random weights of the size that keeps activations bounded, in the given dtype."""
    network = abstract_network(kind, config, jnp.dtype(dtype))
    # Some million numbers, each weight from another one on: to draw those of a UNet would take ten seconds.
    drawn = np.random.default_rng(0).standard_normal(DRAWN, dtype=np.float32)
    starts = itertools.accumulate(math.prod(leaf.shape) for leaf in jax.tree.leaves(network.params))

    def draw(path, leaf, start):
        name, shape = path[-1].key, leaf.shape
        scale = 0.02 if name == "embedding" else np.prod(shape[:-1]) ** -0.5 if name == "kernel" else 0.1
        values = np.resize(np.roll(drawn, start), shape) * np.float32(scale)
        if name == "scale":
            values += 1
        return jnp.asarray(values, leaf.dtype)

    starts = jax.tree.unflatten(jax.tree.structure(network.params), list(starts))
    return network._replace(params=jax.tree_util.tree_map_with_path(draw, network.params, starts))


def family_of(name: str, unet: Path | None, size: int | None) -> tuple[Family, int]:
    """The networks of a family, and the side of its latents.

    Args:
        name: of the family.
        unet: config.json of another UNet that takes the place of the family's; None: its own.
        size: side of the images in pixels; None: the family's own.
    """
    family = FAMILIES[name]
    if unet is not None:
        family = family._replace(unet=UNetConfig.from_dict(read_json(unet, expected="a config.json of a UNet")))
    return family, (size or family.resolution) // 8


def random_inputs(family: Family, batch_size: int, size: int) -> dict[str, np.ndarray]:
    """Arguments of a UNet; `size` in latent pixels."""
    rng = np.random.default_rng(1)
    shapes = {
        "latents": (size, size, family.unet.in_channels),
        "encoder_hidden_states": (77, family.unet.cross_attention_dim),
    }
    if family.unet.addition_embed_type == "text_time":
        shapes["text_embeds"] = (family.text_encoders[-1].projection_dim,)
    inputs: dict[str, np.ndarray] = {
        name: rng.standard_normal((batch_size, *shape), dtype=np.float32) for name, shape in shapes.items()
    }
    inputs["timesteps"] = np.linspace(981, 21, batch_size).astype(np.int32)
    if "text_embeds" in inputs:
        inputs["time_ids"] = np.tile(size_ids([8 * size] * 2, (0, 0), [8 * size] * 2), (batch_size, 1))
    return inputs


def time_in_turns(candidates: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round; one untimed call first. In turns, so that a busy machine slows all alike."""
    if rounds < 1:
        raise ValueError(f"bench: --rounds {rounds}; expected at least one timed call")
    for call in candidates.values():
        call()
    seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median seconds of each candidate of `time_in_turns`."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def each_round(seconds: Mapping[str, Sequence[float]], divisor: float = 1) -> dict[str, list[float]]:
    """Seconds of `time_in_turns` as figures of a bench; how much rounds differ is the noise of their median.

    Args:
        seconds: of each candidate in every round.
        divisor: units of work in a round, of which each then has its seconds.
    """
    return {name: [float(f"{value / divisor:.5g}") for value in values] for name, values in seconds.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The device


class Reached(NamedTuple):
    """What a device was measured to reach, beside which a program's work is put.

    Attributes:
        flops: per second, in matrix products of the dtype in question.
        bandwidth: bytes per second, read and written by a copy.
    """

    flops: float
    bandwidth: float

    @classmethod
    def measured(cls, dtype: str) -> "Reached":
        """Of JAX's default device, in about a second."""
        return cls(measured_peak(dtype=dtype), measured_bandwidth())

    def figures(self) -> dict[str, float]:
        """For a bench to tell."""
        return {
            "measured_peak_tflops": round(self.flops / 1e12, 4),
            "copy_gb_per_second": round(self.bandwidth / 1e9, 2),
        }

    def shares(self, flops: float, moved: float, seconds: float) -> dict[str, float]:
        """What a program of so many FLOP and bytes, which takes so many seconds, reaches of it."""
        return {
            "share_of_measured_peak": round(flops / seconds / self.flops, 3),
            "share_of_copy_bandwidth": round(moved / seconds / self.bandwidth, 3),
        }


def bytes_accessed(compiled: Any) -> float:
    """What a compiled program reads and writes, as XLA counts it: the body of a loop once."""
    return compiled.cost_analysis().get("bytes accessed", 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def peak_gb() -> float:
    """Largest resident memory of this process so far; Linux counts in kB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def memory_peak_gb() -> float:
    """Largest memory in use on the device so far; where the device is the host, that of this process."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 1e9 if stats else peak_gb()
