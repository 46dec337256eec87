"""From the start of Python to a training step that can be called, with an empty compilation cache and a filled one.

The step is that of train.modules, made from shapes: weights and data are not there, and loading them is not counted.
"""

import collections
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import jax

from flax_pref.data.pipeline import InputConfig
from flax_pref.methods import DiffusionDPO
from flax_pref.models.attention import Kernel
from flax_pref.models.remat import Remat
from flax_pref.parallel.memory import aligned
from flax_pref.parallel.mesh import TRAINING_AXES, make_mesh
from flax_pref.parallel.peak import compile_and_count
from flax_pref.planning.training import step_job
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.trainer import TrainConfig

MODELS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compile:
    """Times the start of Diffusion-DPO with adapters: with an empty compilation cache, then with what that has left."""

    family: Literal["sd15", "sdxl"] = "sd15"
    """Its networks, and the size of its images."""
    model: str | None = None
    """A checkpoint that takes the place of the family's: a folder in the layout of diffusers, or "demo"."""
    rank: int = 16
    """Of the adapters."""
    batch_size: int = 1
    """Pairs on all devices together."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the network computes in; auto: bfloat16 on TPUs and GPUs, float32 on CPUs."""
    attention: Kernel = "auto"
    remat: Remat = "none"
    """What is computed again in the backward pass instead of kept; see `models.remat.set_remat`."""
    json: Path | None = None
    """File for the figures."""


def bench_compile(bench: Compile) -> dict:
    """Seconds of both starts, part by part; a table of them goes to stderr."""
    config = train_config(bench)  # a mistake is told here, not by another process
    with tempfile.TemporaryDirectory() as folder:
        first, second = (start(bench, Path(folder)) for _ in range(2))
    parts = zip(first["seconds"], first["seconds"].values(), second["seconds"].values(), strict=True)
    rows = [("seconds", "empty cache", "filled cache"), *((name, f"{a:.1f}", f"{b:.1f}") for name, a, b in parts)]
    print(aligned(rows), file=sys.stderr)
    return {
        **{"model": config.model, "batch_size": bench.batch_size, "rank": bench.rank, "jax": jax.__version__},
        **{"attention": bench.attention, "remat": bench.remat, **first.pop("on")},
        "empty_cache": first,
        "filled_cache": {name: told for name, told in second.items() if name != "on"},
    }


def start(bench: Compile, cache: Path) -> dict:
    """What a process tells of its start, with this folder as its compilation cache."""
    fields = json.dumps({**dataclasses.asdict(bench), "json": None})
    # What JAX keeps in the cache is left to its settings.
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "bench.compile", fields, str(time.time())]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if child.returncode:
        raise ValueError(f"bench: {' '.join(command)} failed, see above")
    return json.loads(child.stdout)


# ----------------------------------------------------------------------------------------------------------------------
# In the process that starts


def _child(fields: str, started: str) -> None:
    bench = Compile(**json.loads(fields))
    ends = {"imports": time.time()}
    events = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    config = train_config(bench)
    mesh = make_mesh(config.mesh, jax.devices(), TRAINING_AXES)
    step = step_job(config, mesh)
    ends["networks"] = time.time()
    with jax.set_mesh(mesh):
        traced = step.program.trace(*step.arguments)
        ends["tracing"] = time.time()
        lowered = traced.lower()
        ends["lowering"] = time.time()
        compile_and_count(lowered, step.program, *step.arguments)
        ends["compiling or loading"] = time.time()
    begins = (float(started), *ends.values())
    seconds = {name: end - begin for (name, end), begin in zip(ends.items(), begins, strict=False)}
    seconds |= {"all": sum(seconds.values()), "all, of processors": time.process_time()}
    loaded = events["/jax/compilation_cache/cache_hits"]
    told = {
        "on": {"device": mesh.devices.flat[0].device_kind, "dtype": str(jax.tree.leaves(step.arguments[1])[0].dtype)},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "programs_compiled": events["/jax/compilation_cache/compile_requests_use_cache"] - loaded,
        "programs_loaded": loaded,
    }
    print(json.dumps(told))


def train_config(bench: Compile) -> TrainConfig:
    """A run without a prepared set: what is not there is taken to be of the networks' own size."""
    return TrainConfig(
        output=Path("none"),
        model=bench.model or MODELS[bench.family],
        data=Path("none"),
        method=DiffusionDPO(),
        lora=LoRA(rank=bench.rank),
        input=InputConfig(batch_size=bench.batch_size),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        steps=1,
        dtype=bench.dtype,
        attention=bench.attention,
        remat=bench.remat,
    )


if __name__ == "__main__":
    _child(*sys.argv[1:])
