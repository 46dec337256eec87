"""Ten kills at random times: the same command ends with the bytes of an undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flax_pref.data.pick_a_pic import LabelledPair, write_pairs
from tests.data.preference_sets import examples
from tests.parallel.test_agreement import ROOT
from tests.test_images import contents
from tests.test_score import draw_run
from tests.test_train_modules import check_the_same, newest
from tests.training.tiny import tiny_world

pytestmark = pytest.mark.long
CONFIG = """
from pathlib import Path

from tests.training.tiny import tiny_run
from flax_pref.training.trainer import CheckpointConfig

config = tiny_run(Path({output!r}), Path({world!r}), steps=60, checkpoints=CheckpointConfig(every=4))
"""
LOCKS = (".lock", ".lock.json")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"))


def begun(command):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def run(command):
    start, process = time.monotonic(), begun(command)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-2000:]
    return time.monotonic() - start


def kill_at_random(command, times, seconds, rng):
    """Kills the program and all its children; how many of the kills met it alive."""
    alive = 0
    for _ in range(times):
        process = begun(command)
        # Where it works, not where Python is imported, most of the time.
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        alive += process.poll() is None
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return alive


def files(folder: Path) -> dict[str, str]:
    return {name: sha256 for name, sha256 in contents(folder).items() if not Path(name).name.startswith(LOCKS)}


def programs(tmp_path, world):
    """Of each program: how often it is killed, its command for a folder, and how the folder is begun."""
    rows = [row for row in examples(160, size=(64, 64))]
    write_pairs(
        tmp_path / "pairs.parquet",
        [LabelledPair(r.caption, *r.images, r.labels[0], f"{i}-0", f"{i}-1", "a", "b") for i, r in enumerate(rows)],
        rows_per_group=16,
    )
    (tmp_path / "prompts.txt").write_text("".join(f"a cat, {'abcdefghij'[i % 10]}\n" for i in range(60)))

    def encode(folder):
        source = ("--source.path", tmp_path / "pairs.parquet", "--shard-size", "4", "--encoding.batch-size", "2")
        return ("train.encode", "configs/demo/encode.py", *source, "--output", folder)

    def images(folder):
        drawn = ("--prompts", tmp_path / "prompts.txt", "--seeds", "0-3", "--steps", "2", "--batch-size", "4")
        return ("sample.images", "--model", world / "sd15", *drawn, "--shard-size", "8", "--out", folder)

    def score(folder):
        if not folder.exists():
            draw_run(folder, seeds=40)
        return ("sample.score", folder, "--rewards", "judge", "compressibility", "--batch-size", "8")

    return {"encode": (3, encode), "images": (3, images), "score": (2, score)}


@pytest.mark.parametrize("name", ["encode", "images", "score"])
def test_killed_at_random_times_a_program_ends_with_the_same_files(name, world, tmp_path):
    times, command = programs(tmp_path, world)[name]
    run(command(tmp_path / "warm"))  # so that what is compiled lies in the cache
    seconds = run(command(tmp_path / "calm"))
    alive = kill_at_random(command(tmp_path / "killed"), times, seconds, random.Random(name))
    run(command(tmp_path / "killed"))
    assert files(tmp_path / "killed") == files(tmp_path / "calm")
    print(f"{name}: {alive} of {times} kills met it alive, of {seconds:.0f} s")
    assert alive


def test_killed_at_random_times_training_ends_with_the_same_weights(world, tmp_path):
    def command(name):
        (tmp_path / f"{name}.py").write_text(CONFIG.format(output=str(tmp_path / name), world=str(world)))
        return "train.modules", tmp_path / f"{name}.py"

    run(command("warm"))
    seconds = run(command("calm"))
    alive = kill_at_random(command("killed"), 2, seconds, random.Random(0))
    run(command("killed"))
    assert newest(tmp_path / "killed") == 60
    check_the_same(tmp_path / "killed", tmp_path / "calm", 60)
    print(f"modules: {alive} of 2 kills met it alive, of {seconds:.0f} s")
    assert alive
