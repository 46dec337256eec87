"""`python -m train.modules` as users run it: killed, told to end, on several hosts and on other meshes."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from flax_pref.parallel.signals import PREEMPTED
from tests.training import tiny
from tests.training.tiny import recorded, saved_arrays, tiny_world

ROOT = Path(__file__).parents[1]
# A program that makes a few steps is done sooner than it could be made fast.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
CONFIG = """
from pathlib import Path

from tests.training.tiny import tiny_run
from flax_pref.training.trainer import CheckpointConfig

config = tiny_run(Path({output!r}), Path({world!r}), steps={steps}, checkpoints=CheckpointConfig(every=3))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"))


def start(*arguments, devices=1):
    environment = {"PYTHONPATH": str(ROOT)}
    if devices > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    # Into files, for a pipe that nobody reads stops a process when it is full.
    outputs = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        stdout=outputs[0],
        stderr=outputs[1],
        env=os.environ | environment,
    )
    return process, outputs


def finish(started, status=0):
    process, outputs = started
    process.wait(timeout=900)
    told, errors = (output.seek(0) or output.read() for output in outputs)
    for output in outputs:
        output.close()
    assert process.returncode == status, errors[-3000:]
    return told


# ----------------------------------------------------------------------------------------------------------------------
# Kills and signals


def program(folder, world, steps):
    """The command of a run whose output is `folder`/run."""
    folder.mkdir()
    (folder / "config.py").write_text(CONFIG.format(output=str(folder / "run"), world=str(world), steps=steps))
    return "-m", "train.modules", folder / "config.py"


def newest(output):
    """The newest step with a manifest, or 0."""
    return max((int(path.parent.name) for path in (output / "checkpoints").glob("*/manifest.json")), default=0)


def recorded_since(output, moment):
    """The last step that a process begun at this moment has recorded; 0: none."""
    file = output / "metrics.jsonl"
    # A run that goes on first cuts off what is behind its checkpoint: a file that has been changed is its own.
    if not file.exists() or file.stat().st_mtime < moment:
        return 0
    return max(
        (json.loads(line)["step"] for line in file.read_text().splitlines(True) if line.endswith("\n")), default=0
    )


def start_and_wait(command, output, step):
    """A process that has recorded this step, or ended."""
    moment, started = time.time(), start(*command)
    while started[0].poll() is None and recorded_since(output, moment) < step:
        time.sleep(0.005)
    return started


def check_the_same(run, undisturbed, steps):
    ends = [saved_arrays(folder, steps) for folder in (run, undisturbed)]
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        np.testing.assert_array_equal(ends[0][name], ends[1][name], err_msg=name)
    files = [(folder / "modules" / "dpo.safetensors").read_bytes() for folder in (run, undisturbed)]
    assert files[0] == files[1]
    lines = [[(line["step"], line["loss"]) for line in recorded(folder)] for folder in (run, undisturbed)]
    assert [step for step, _ in lines[0]] == list(range(1, steps + 1)), "each step is recorded once"
    assert lines[0] == lines[1]


def kill_at_random(command, output, times, rng):
    """How many of these runs were killed at work."""
    killed = 0
    for _ in range(times):
        if rng.random() < 0.75:
            process, outputs = start_and_wait(command, output, newest(output) + 2 + rng.randrange(6))
            time.sleep(rng.uniform(0, 0.1))
        else:  # while it begins
            process, outputs = start(*command)
            time.sleep(rng.uniform(0, 6))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        for file in outputs:
            file.close()
    return killed


@pytest.mark.program
def test_killed_and_told_to_end_a_run_comes_to_the_weights_of_an_undisturbed_one(tmp_path, world):
    steps = 150
    finish(start(*program(tmp_path / "undisturbed", world, steps)))
    command, output = program(tmp_path / "disturbed", world, steps), tmp_path / "disturbed" / "run"
    assert kill_at_random(command, output, 2, random.Random(1)) == 2

    started = start_and_wait(command, output, newest(output) + 2)
    started[0].send_signal(signal.SIGTERM)
    sent = time.monotonic()
    told = finish(started, PREEMPTED)
    assert time.monotonic() - sent < 20
    assert f"told to end: saved step {newest(output)}; the same command resumes there" in told
    assert newest(output) < steps and not (output / "modules").exists()
    assert recorded(output)[-1]["step"] == newest(output)

    assert f"resumes from step {newest(output)}" in finish(start(*command))
    check_the_same(output, tmp_path / "undisturbed" / "run", steps)


@pytest.mark.long
def test_killed_at_20_random_moments_a_run_comes_to_the_weights_of_an_undisturbed_one(tmp_path, world):
    steps = 800  # enough for twenty kills on a fast machine
    finish(start(*program(tmp_path / "undisturbed", world, steps)))
    command, output = program(tmp_path / "disturbed", world, steps), tmp_path / "disturbed" / "run"
    assert kill_at_random(command, output, 20, random.Random(0)) == 20
    finish(start(*command))
    check_the_same(output, tmp_path / "undisturbed" / "run", steps)


# ----------------------------------------------------------------------------------------------------------------------
# Meshes and hosts. See training/tiny_legs.py.


@pytest.fixture(scope="module")
def legs(world, tmp_path_factory):
    """A folder with runs of 6 steps: on one mesh, on two, on two hosts, and on one host and two in turn."""
    folder = tmp_path_factory.mktemp("legs")
    program = (Path(tiny.__file__).with_name("tiny_legs.py"), world, folder)
    whole = ("dpo:whole:data=4:6", "modules:whole-modules:data=4:6")
    meshes = ("dpo:meshes:data=4:3", "dpo:meshes:fsdp=2,tensor=2:6")
    told = finish(start(*program, *whole, *meshes, "dpo:one-two:data=4:3", devices=4))
    (folder / "told.txt").write_text(told)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = ("dpo:hosts:data=4:6", "modules:hosts-modules:data=4:6", "dpo:one-two:data=4:6", "dpo:two-one:data=4:3")
    processes = [start(*program, *hosts, "--hosts", f"{address},2,{i}", devices=2) for i in range(2)]
    try:
        for process in processes:
            finish(process)
    finally:
        for process, _ in processes:
            process.kill()
            process.wait()
    finish(start(*program, "dpo:two-one:data=4:6", devices=4))
    return folder


@pytest.mark.program
@pytest.mark.parametrize("name", ["meshes", "hosts", "hosts-modules", "one-two", "two-one"])
def test_on_other_meshes_and_hosts_a_run_sees_the_same_pairs_and_has_the_same_losses(legs, name):
    whole = legs / ("whole-modules" if "modules" in name else "whole")
    rows, expected = (
        [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        for folder in (legs / name, whole)
    )
    assert rows == expected and len(rows) == 6
    losses, expected = ([line["loss"] for line in recorded(folder)] for folder in (legs / name, whole))
    assert len(losses) == 6
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    print(f"{name}: largest difference of losses {np.abs(np.subtract(losses, expected)).max():.1e}")


@pytest.mark.program
def test_on_other_meshes_and_hosts_a_run_comes_to_the_same_weights(legs):
    whole = saved_arrays(legs / "whole", 6)
    for name in ("meshes", "hosts", "one-two", "two-one"):
        found = saved_arrays(legs / name, 6)
        for path, array in whole.items():
            np.testing.assert_allclose(found[path], array, rtol=1e-3, atol=1e-4, err_msg=f"{name} {path}")


@pytest.mark.program
def test_parameters_are_divided_as_the_mesh_says(legs):
    _, told = (legs / "told.txt").read_text().split("mesh fsdp=2, tensor=2: 4 cpu on 1 host")
    told, *_ = told.split("mesh data=4")
    in_all, per_device = re.search(r"^base .* ([\d.]+) KiB +([\d.]+) KiB$", told, re.MULTILINE).groups()
    assert float(per_device) < 0.6 * float(in_all)
    # Of each adapter, too small for fsdp, the tensor axis halves one of the two matrices.
    assert re.search(r"^modules +256 +1\.00 KiB +768 B$", told, re.MULTILINE), told
