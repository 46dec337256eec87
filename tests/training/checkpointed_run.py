"""A small run that saves every second step and its last, on meshes and hosts of choice.

In `python checkpointed_run.py FOLDER RESULTS 2x4:3 4x2:5` the text `2x4:3` is a leg: it goes on from the newest
checkpoint, on a mesh of 2 x 4 devices, until 3 updates are made. What it went on from and what it ended with is written
to RESULTS.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_pref.parallel.hosts import join
from flax_pref.parallel.signals import PREEMPTED, anywhere, stopped_by
from flax_pref.training.checkpoints import RunCheckpoints

SETTINGS = {"seed": 3, "optimizer": {"name": "adam", "learning_rate": 0.1}}
ADAM = optax.adam(0.1)
MANY = 3000  # updates, more than a run comes to that is stopped


class State(NamedTuple):
    params: Any
    optimizer: Any
    key: jax.Array


def begin() -> State:
    params = {"w": jax.random.normal(jax.random.key(0), (32, 16)), "b": jnp.arange(8, dtype=jnp.bfloat16)}
    return State(params, ADAM.init(params), jax.random.key(3))


def update(state: State) -> State:
    key, drawn = jax.random.split(state.key)
    gradients = jax.tree.map(lambda x: jnp.sin(x) + jax.random.normal(drawn, x.shape, x.dtype), state.params)
    updates, optimizer = ADAM.update(gradients, state.optimizer)
    return State(optax.apply_updates(state.params, updates), optimizer, key)


def laid_out(mesh: Mesh) -> State:
    """Shapes with shardings: matrices over both axes of the mesh, vectors over the second."""

    def sharded(x):
        spec = {0: (), 1: ("fsdp",), 2: ("data", "fsdp")}[len(x.shape)]
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(sharded, jax.eval_shape(begin))


def written(file: Path, state: State) -> None:
    """Writes all values of a state, on whatever devices of whatever hosts they are."""
    values = {}
    for path, x in jax.tree.leaves_with_path(state):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        values[jax.tree_util.keystr(path)] = multihost_utils.process_allgather(x, tiled=True).astype(np.float64)
    if jax.process_index() == 0:
        np.savez(file, **values)


def told(**values) -> None:
    print(json.dumps(values), flush=True)


def run_leg(folder: Path, results: Path, shape: tuple[int, int], steps: int) -> int:
    """How many updates were made when the leg ended."""
    mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("data", "fsdp"))
    like = laid_out(mesh)
    first, following = programs(like)
    with stopped_by(signal.SIGTERM) as stop, RunCheckpoints(folder, SETTINGS, keep=2) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            step, state = 0, first()
        else:
            state, data = checkpoints.restore(step, like)
            assert data == {"next": step}
            assert all(jax.tree.leaves(jax.tree.map(lambda x, wanted: x.sharding == wanted.sharding, state, like)))
        written(results / f"{step}-restored.npz", state)
        told(restored=step)
        while step < steps and not anywhere(stop()):
            state, step = following(state), step + 1
            told(made=step)
            if step % 2 == 0:
                checkpoints.save(step, state, {"next": step})
            if step % 8 == 0:
                checkpoints.wait()
                told(safe=step)
        checkpoints.save(step, state, {"next": step})
    told(ended=step)
    written(results / f"{step}-final.npz", state)
    return step


def programs(like: State):
    shardings = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(begin, out_shardings=shardings), jax.jit(update, donate_argnums=0, out_shardings=shardings)


def run_undisturbed(results: Path, steps: int) -> None:
    first, following = programs(laid_out(Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))))
    state = first()
    for _ in range(steps):
        state = following(state)
    written(results / "undisturbed.npz", state)


def run_and_kill(folder: Path, results: Path, times: int) -> None:
    """Kills as many runs at random moments; then one comes to an end, and another does all the work undisturbed."""
    rng = random.Random(0)
    end_child(start_child(folder.with_name("other"), results, 2)[0])  # leaves compiled programs
    for _ in range(times):
        child, lines = start_child(folder, results, MANY)
        with lines:
            for _ in range(rng.randrange(12)):
                print(lines.readline(), end="")
            time.sleep(rng.uniform(0, 0.06))
            os.kill(child, signal.SIGKILL)
            assert os.WTERMSIG(end_child(child)) == signal.SIGKILL
            for line in lines:
                print(line.rstrip("\n"), flush=True)  # the kill may have come between the last line and its end
    steps = 3 + max(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    run_leg(folder, results, (1, 1), steps)
    run_undisturbed(results, steps)


def start_child(folder: Path, results: Path, steps: int) -> tuple[int, TextIO]:
    """A process that runs a leg, and the lines that it prints. It does not import all modules once more."""
    reading, writing = os.pipe()
    child = os.fork()  # the parent has not begun to use devices
    if child:
        os.close(writing)
        return child, os.fdopen(reading)
    try:
        os.dup2(writing, 1)
        run_leg(folder, results, (1, 1), steps)
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def end_child(child: int) -> int:
    return os.waitpid(child, 0)[1]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("legs", nargs="*")
    parser.add_argument("--hosts")
    parser.add_argument("--undisturbed", type=int, help="updates to make without checkpoints on one device")
    parser.add_argument("--kills", type=int)
    flags = parser.parse_args()
    if flags.kills:
        return run_and_kill(flags.folder, flags.results, flags.kills)
    if flags.hosts:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    join(flags.hosts)
    for leg in flags.legs:
        shape, steps = leg.split(":")
        if run_leg(flags.folder, flags.results, tuple(map(int, shape.split("x"))), int(steps)) < int(steps):
            return PREEMPTED
    if flags.undisturbed:
        run_undisturbed(flags.results, flags.undisturbed)


if __name__ == "__main__":
    sys.exit(main())
