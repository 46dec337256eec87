"""A run goes on from what was saved, bit by bit, or says in one line why it does not."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import checkpointed_run
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_pref.config import UserError
from flax_pref.parallel.signals import PREEMPTED
from flax_pref.training.checkpoints import RunCheckpoints

ROOT = Path(__file__).parents[2]
SETTINGS = {"seed": 0, "optimizer": {"name": "adam", "learning_rate": 0.1}}


class Run(NamedTuple):
    params: Any
    optimizer: Any
    keys: dict[str, jax.Array]


def state_of(step):
    """Numbers of a step, no others of which are like them."""
    keys = jax.random.split(jax.random.key(step), 3)
    params = {
        "layers": [{"kernel": jax.random.normal(keys[0], (5, 7))}, {"kernel": jnp.full((2, 3), step, jnp.int8)}],
        "norm/scale": jax.random.normal(keys[1], (9,), jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    return Run(params, optimizer, {"noise": jax.random.key(step), "pairs": jax.random.split(keys[2], 4)})


LIKE = jax.eval_shape(lambda: state_of(0))


def bits(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return x.shape, x.dtype, np.asarray(x).tobytes()


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return [(x.dtype, bits(x)) for x in jax.tree.leaves(one)] == [(x.dtype, bits(x)) for x in jax.tree.leaves(other)]


def saved(folder, *steps, **options):
    with RunCheckpoints(folder, SETTINGS, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {"step": step, "seed": 3, "fingerprint": "ab", "list": [1, 0.1]})
    return folder


def opened(folder):
    return RunCheckpoints(folder, SETTINGS)


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name != "settings.json")


# ----------------------------------------------------------------------------------------------------------------------
# What was saved comes back


def test_everything_comes_back_bit_by_bit_low_precision_and_keys_too(tmp_path):
    with opened(saved(tmp_path, 3, 7)) as checkpoints:
        assert checkpoints.latest() == 7
        for step in (3, 7):
            state, data = checkpoints.restore(step, LIKE)
            assert same(state, state_of(step))
            assert data == {"step": step, "seed": 3, "fingerprint": "ab", "list": [1, 0.1]}
        assert not same(checkpoints.restore(3, LIKE)[0], state_of(7))
    # A restored key draws what the saved one would have drawn.
    assert bits(jax.random.normal(state.keys["noise"], (4,))) == bits(jax.random.normal(jax.random.key(7), (4,)))


def test_a_new_folder_has_no_step(tmp_path):
    with opened(tmp_path / "runs" / "new") as checkpoints:
        assert checkpoints.latest() is None


def test_arrays_are_safe_from_donation_as_soon_as_save_returns_and_files_come_later(tmp_path):
    large = jax.random.normal(jax.random.key(0), (16 * 2**20,))
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    wanted = np.array(large + 0)  # of a copy: an array that numpy looks at is not donated
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": large}, {})
        assert not (tmp_path / "1" / "manifest.json").exists()
        for _ in range(5):
            large = add(large)
        large.block_until_ready()
        checkpoints.wait()
        assert (tmp_path / "1" / "manifest.json").exists()
        state, _ = checkpoints.restore(1, {"x": jax.ShapeDtypeStruct(large.shape, large.dtype)})
    assert np.array_equal(state["x"], wanted)


def test_data_is_what_it_was_when_save_was_called(tmp_path):
    data = {"step": 1}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(3)}, data)
        data["step"] = 2
        assert checkpoints.restore(1, {"x": jnp.zeros(3)})[1] == {"step": 1}


def test_old_steps_go_and_those_kept_by_rule_stay(tmp_path):
    assert steps_in(saved(tmp_path / "three", *range(6))) == [3, 4, 5]
    assert steps_in(saved(tmp_path / "rule", *range(1, 13), keep=2, keep_every=5)) == [5, 10, 11, 12]
    assert steps_in(saved(tmp_path / "rule", 14, keep=2, keep_every=5)) == [5, 10, 12, 14]
    assert steps_in(saved(tmp_path / "rule", 16, keep=1, keep_every=7)) == [14, 16]


def test_a_step_saved_again_by_another_run_is_replaced_and_those_after_it_go(tmp_path):
    saved(tmp_path, 1, 2, 3)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(2, state_of(9), {})
        assert checkpoints.latest() == 2
        assert same(checkpoints.restore(2, LIKE)[0], state_of(9))
        checkpoints.save(2, state_of(8), {})  # nothing new: the run is where it was
        assert same(checkpoints.restore(2, LIKE)[0], state_of(9))
    assert steps_in(tmp_path) == [1, 2]


def test_a_run_that_ends_where_it_went_on_from_leaves_the_checkpoint_as_it_is(tmp_path):
    manifest = saved(tmp_path, 1) / "1" / "manifest.json"
    before = manifest.stat()
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, checkpoints.restore(1, LIKE)[0], {})
    assert manifest.stat() == before


def test_what_a_kill_left_behind_goes_with_the_next_step(tmp_path):
    saved(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "2", tmp_path / "3")
    (tmp_path / "3" / "manifest.json").unlink()
    (tmp_path / "3" / "state").rename(tmp_path / "3" / "state.orbax-checkpoint-tmp")
    assert steps_in(saved(tmp_path, 4)) == [1, 2, 4]


@pytest.fixture
def short_files():
    """Files cannot grow above 1 MB, as if the disk was full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_those_before_stay(tmp_path, short_files, caplog):
    large = {"x": jax.random.normal(jax.random.key(0), (10**6,))}
    checkpoints = opened(saved(tmp_path, 1))
    checkpoints.save(2, large, {})
    with pytest.raises(OSError, match=r"/2: this checkpoint could not be written \(.*\); free space and run") as caught:
        checkpoints.close()
    assert "\n" not in str(caught.value) and not caplog.records
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1


# ----------------------------------------------------------------------------------------------------------------------
# Damage


def flip(file, rng):
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(file, rng):
    os.truncate(file, rng.randrange(file.stat().st_size))


def delete(file, rng):
    file.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_a_step_with_any_file_damaged_is_passed_over_with_one_line(tmp_path, capsys, damage):
    rng = random.Random(0)
    whole = saved(tmp_path / "whole", 1, 2)
    files = [file.relative_to(whole) for file in sorted((whole / "2").rglob("*")) if file.is_file()]
    assert len(files) > 10 and Path("2/manifest.json") in files
    folder = shutil.copytree(whole, tmp_path / "run")
    with opened(folder) as checkpoints:
        for file in files:
            assert checkpoints.latest() == 2
            assert capsys.readouterr().out == ""
            damage(folder / file, rng)
            assert checkpoints.latest() == 1
            told = capsys.readouterr().out
            assert told.startswith(f"{folder / '2'}: not used: ") and file.name in told and told.count("\n") == 1
            with pytest.raises(ValueError, match=file.name):
                checkpoints.restore(2, LIKE)
            shutil.copy(whole / file, folder / file)
        assert same(checkpoints.restore(1, LIKE)[0], state_of(1))


def test_no_flipped_bit_of_a_manifest_is_overlooked(tmp_path):
    folder = saved(tmp_path, 1, 2)
    file = folder / "2" / "manifest.json"
    content, rng = file.read_bytes(), random.Random(0)
    with opened(folder) as checkpoints:
        noted = checkpoints.restore(2, LIKE)[1]
        for place in rng.sample(range(len(content)), 300):
            damaged = bytearray(content)
            damaged[place] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            # Some characters between values do not matter to JSON.
            assert checkpoints.latest() == 1 or checkpoints.restore(2, LIKE)[1] == noted


def test_damaged_steps_do_not_count_as_kept(tmp_path, capsys):
    folder = saved(tmp_path, 1, 2)
    flip(folder / "2" / "state" / "_METADATA", random.Random(0))
    with RunCheckpoints(folder, SETTINGS, keep=2) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(3, state_of(3), {})
    assert steps_in(folder) == [1, 3]
    capsys.readouterr()


def test_if_all_steps_are_damaged_there_is_none(tmp_path, capsys):
    folder = saved(tmp_path, 1, 2)
    for step in (1, 2):
        shutil.rmtree(folder / str(step) / "state")
    with opened(folder) as checkpoints:
        assert checkpoints.latest() is None
    assert capsys.readouterr().out.count("not used") == 2


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


def test_a_folder_of_other_settings_is_refused_with_the_difference(tmp_path):
    saved(tmp_path, 1)
    other = {"seed": 0, "optimizer": {"name": "adam", "learning_rate": 0.2}, "rank": 4}
    with pytest.raises(UserError) as caught:
        RunCheckpoints(tmp_path, other)
    assert str(caught.value) == (
        f"{tmp_path}: holds checkpoints of a run with optimizer.learning_rate=0.1, now optimizer.learning_rate=0.2; no "
        "rank, now rank=4: repeat these settings, or choose another --output and begin again from those weights with "
        "--init-from"
    )
    RunCheckpoints(tmp_path, SETTINGS | {"optimizer": dict(reversed(SETTINGS["optimizer"].items()))}).close()


def test_settings_that_cannot_be_read_are_not_taken_for_equal(tmp_path):
    file = saved(tmp_path, 1) / "settings.json"
    for content in ("{", "[]"):
        file.write_text(content)
        with pytest.raises(UserError, match=r"settings\.json: damaged, not a JSON object; restore it"):
            opened(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"settings\.json: missing beside checkpoints; restore it"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda like: like._replace(keys={}), r"\.keys\['noise'\]=key<fry> \[\], now no \.keys\['noise'\]; "),
        (
            lambda like: like._replace(params=like.params | {"bias": jax.ShapeDtypeStruct((2,), jnp.float32)}),
            r"saved with no \.params\['bias'\], now \.params\['bias'\]=float32 \[2\]; go on",
        ),
        (
            lambda like: like._replace(params=like.params | {"norm/scale": jax.ShapeDtypeStruct((9,), jnp.float32)}),
            r"\['norm/scale'\]=bfloat16 \[9\], now \.params\['norm/scale'\]=float32 \[9\]; go on",
        ),
        (
            lambda like: like._replace(params=like.params | {"norm/scale": jax.ShapeDtypeStruct((8,), jnp.bfloat16)}),
            r"\['norm/scale'\]=bfloat16 \[9\], now \.params\['norm/scale'\]=bfloat16 \[8\]; go on",
        ),
        (
            lambda like: like._replace(optimizer=optax.sgd(0.1).init(like.params)),
            r"now no \.optimizer.* and 4 more; go on",
        ),
    ],
)
def test_arrays_that_are_missing_added_or_others_are_named_in_one_line(tmp_path, change, message):
    with opened(saved(tmp_path, 1)) as checkpoints, pytest.raises(ValueError, match=message) as caught:
        checkpoints.restore(1, change(LIKE))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_a_step_that_is_not_there_is_one_line(tmp_path):
    with opened(saved(tmp_path, 1)) as checkpoints, pytest.raises(ValueError, match=r"/5: it has no manifest"):
        checkpoints.restore(5, LIKE)


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep_every": 0}])
def test_keeping_nothing_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="expected numbers of steps, 1 or more"):
        RunCheckpoints(tmp_path, SETTINGS, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Programs: meshes, hosts, kills. See checkpointed_run.py.


def start(folder, *flags, devices, **environment):
    (folder / "results").mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, checkpointed_run.__file__, folder / "run", folder / "results", *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)} | environment,
    )


def finish(process, status=0):
    """What the program told; other lines, as those of damaged steps, as strings."""
    told, errors = process.communicate(timeout=240)
    assert process.returncode == status, errors[-3000:]
    return [json.loads(line) if line.startswith("{") else line for line in told.splitlines()]


def start_two(folder, *flags):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [start(folder, *flags, "--hosts", f"{address},2,{i}", devices=4) for i in range(2)]


def reported(told, what):
    return [line[what] for line in told if isinstance(line, dict) and what in line]


def wait_for(process, word):
    """Returns when the program has told something with this word in it."""
    while word not in (line := process.stdout.readline()):
        assert line, process.communicate()[1]


def results(folder, name):
    return dict(np.load(folder / "results" / f"{name}.npz"))


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def check_went_on(folder, *steps):
    """A leg went on from what the one before had ended with, bitwise; the end is near that of a run on one device."""
    for step in steps[:-1]:
        ended, restored = (results(folder, f"{step}-{what}") for what in ("final", "restored"))
        assert equal(ended, restored)
    ended, undisturbed = results(folder, f"{steps[-1]}-final"), results(folder, "undisturbed")
    assert ended.keys() == undisturbed.keys()
    for name in ended:
        np.testing.assert_allclose(ended[name], undisturbed[name], rtol=1e-2 if "'b'" in name else 1e-4, atol=1e-5)
    assert np.array_equal(ended[".key"], undisturbed[".key"])


def test_a_run_goes_on_on_other_meshes(tmp_path):
    finish(start(tmp_path, "2x4:2", "4x2:4", "1x1:5", "1x8:6", "--undisturbed", 6, devices=8))
    check_went_on(tmp_path, 2, 4, 5, 6)


@pytest.mark.program
def test_a_run_preempted_on_one_of_two_hosts_stops_on_both_and_goes_on_on_one_and_on_two(tmp_path):
    processes = start_two(tmp_path, f"4x2:{checkpointed_run.MANY}")
    wait_for(processes[1], "safe")
    processes[1].send_signal(signal.SIGTERM)
    (step,), (other,) = (reported(finish(process, PREEMPTED), "ended") for process in processes)
    assert step == other
    told = finish(start(tmp_path, f"2x2:{step + 2}", "--undisturbed", step + 4, devices=4))
    assert reported(told, "restored") == [step]
    for process in start_two(tmp_path, f"2x4:{step + 4}"):
        assert reported(finish(process), "restored") == [step + 2]
    check_went_on(tmp_path, step, step + 2, step + 4)


def test_a_preempted_run_saves_where_it_is_and_ends_with_a_status_of_its_own(tmp_path):
    process = start(tmp_path, f"1x1:{checkpointed_run.MANY}", devices=1)
    wait_for(process, "safe")
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    (step,) = reported(finish(process, PREEMPTED), "ended")
    assert time.monotonic() - sent < 10
    ended = results(tmp_path, f"{step}-final")
    assert reported(finish(start(tmp_path, "1x1:0", devices=1)), "restored") == [step]
    assert equal(results(tmp_path, f"{step}-restored"), ended)


@pytest.mark.program
def test_killed_at_20_random_moments_a_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    told = finish(start(tmp_path, "--kills", 20, devices=1, **compiled))
    assert len(reported(told, "restored")) > 10  # others were killed before they had begun
    last_safe = 0
    for line in told:
        if not isinstance(line, dict):
            assert "not used" in line
            continue
        if "restored" in line:
            assert line["restored"] >= last_safe
            last_safe = line["restored"]
        last_safe = line.get("safe", last_safe)
    steps = max(reported(told, "ended"))
    assert steps > 10
    assert equal(results(tmp_path, f"{steps}-final"), results(tmp_path, "undisturbed"))
