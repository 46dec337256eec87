"""What is written of a run is what the run did, each step once, whatever happened to it."""

import gzip
import io
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from flax_pref.config import UserError
from flax_pref.parallel.memory import budget, memory_limit
from flax_pref.training.records import Profile, Recorder

ROOT = Path(__file__).parents[2]


@jax.jit
def metrics_of(step):
    return {"loss": jnp.sin(step), "accuracy": jnp.cos(step), "skipped": jnp.int32(step) // 3}


def recorder(folder, *, total, **options):
    return Recorder(folder, total=total, **{"per_step": 64, "chips": 8, "show": False, **options})


def train(folder, total, *, first=0, killed_at=None):
    """Steps whose metrics are functions of their number; those that 7 divides are safe."""
    with recorder(folder, total=total, first=first, every=2, lag=3) as records:
        for step in range(first + 1, total + 1):
            records.add(step, metrics_of(float(step)))
            if step % 7 == 0:
                records.flush()
            if step == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)


def lines_of(folder):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events_of(folder):
    """All events in the order of files, of which the last may end anywhere."""
    events = []
    for file in sorted((folder / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns):
        data = file.read_bytes()
        while len(data) >= 12 and len(data) >= 16 + (size := struct.unpack("<Q", data[:8])[0]):
            assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
            event, data = data[12 : 12 + size], data[12 + size :]
            assert struct.unpack("<I", data[:4])[0] == masked_crc32c(event)
            events.append(Event.FromString(event))
            data = data[4:]
    return events


def curves_of(folder):
    """What TensorBoard shows: values by step and name; a session that begins hides what is there of its steps."""
    shown = {}
    for event in events_of(folder):
        if event.session_log.status == SessionLog.START:
            shown = {step: values for step, values in shown.items() if step < event.step}
        for value in event.summary.value:
            if value.HasField("simple_value"):
                shown.setdefault(event.step, {})[value.tag] = value.simple_value
    return shown


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def test_recorded_steps_have_the_metrics_of_that_very_step_in_both_places(tmp_path):
    train(tmp_path, 11)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 11]  # the last step too
    curves = curves_of(tmp_path)
    for line in lines:
        expected = {name: value.item() for name, value in metrics_of(float(line["step"])).items()}
        assert {name: line[name] for name in expected} == expected
        assert line["step_seconds"] > 0
        assert line["pairs_per_second_per_chip"] == pytest.approx(64 / 8 / line["step_seconds"])
        numbers = {name: np.float32(value) for name, value in line.items() if name != "step"}
        assert curves.pop(line["step"]) == numbers
    assert not curves


def test_a_run_that_was_killed_and_goes_on_has_every_step_once_like_one_that_was_not(tmp_path):
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    run = subprocess.run([sys.executable, __file__, str(killed)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == -signal.SIGKILL
    # Killed at step 26, with 21 safe and 23 done: nothing that is safe is missing.
    assert [line["step"] for line in lines_of(killed)] == [*range(2, 24, 2)]
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 24, "lo')
    train(killed, 30, first=21)
    train(undisturbed, 30)

    def course(folder):
        return [{name: line[name] for name in ("step", "loss", "accuracy", "skipped")} for line in lines_of(folder)]

    assert course(killed) == course(undisturbed)
    ours, theirs = curves_of(killed), curves_of(undisturbed)
    assert {step: ours[step]["loss"] for step in ours} == {step: theirs[step]["loss"] for step in theirs}
    assert not [path for path in killed.iterdir() if path.name.startswith(".")]


class Pending:
    """A scalar on a device; whoever looks at it waits for its step."""

    def __init__(self, step, fetched):
        self.step, self.fetched = step, fetched

    def __array__(self, *_, **__):
        self.fetched.append(self.step)
        return np.float32(self.step)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_devices_have_steps_to_do_while_metrics_are_fetched(tmp_path, lag):
    fetched = []
    with recorder(tmp_path, total=9, every=3, lag=lag) as records:
        for step in range(1, 8):
            newest = records.add(step, {"skipped_in_a_row": Pending(step, fetched)})
            done = step - lag
            assert fetched == [*range(1, done + 1)]
            assert newest == ({"step": done, "skipped_in_a_row": done} if done > 0 else None)
        assert records.flush() == {"step": 7, "skipped_in_a_row": 7}  # nothing that a checkpoint covers is missing
        assert [line["step"] for line in lines_of(tmp_path)] == [3, 6]
        records.add(8, {"skipped_in_a_row": Pending(8, fetched)})
        records.add(9, {"skipped_in_a_row": Pending(9, fetched)})
    assert fetched == [*range(1, 10)]
    assert [line["step"] for line in lines_of(tmp_path)] == [3, 6, 9]


def test_times_are_those_between_completions_without_compilation_and_pauses(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Timed(Pending):
        def __array__(self, *_, **__):
            now[0] += {1: 100.0, 5: 50.0}.get(self.step, 2.0)  # the first compiles, the fifth follows a pause
            return np.float32(0)

    with recorder(tmp_path, total=6, every=2, lag=1, flops=32e12, peak=8e12, unit="image") as records:
        for step in range(1, 7):
            records.add(step, {"loss": Timed(step, [])})
            if step == 4:
                records.flush()
    for line in lines_of(tmp_path):
        assert line["step_seconds"] == 2
        assert line["images_per_second_per_chip"] == 64 / 2 / 8
        assert line["model_tflops"] == 32 / 2 / 8
        assert line["share_of_peak"] == 2 / 8


def test_the_rate_of_work_is_that_of_steps_of_several_sizes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Timed(Pending):
        def __array__(self, *_, **__):
            now[0] += 1.0
            return np.float32(0)

    with recorder(tmp_path, total=4, every=2, lag=0, flops=8e12, peak=8e12) as records:
        for step, flops in enumerate((16e12, 32e12, None, 48e12), 1):
            records.add(step, {"loss": Timed(step, [])}, flops)
    # The first step followed nothing; one without a number of its own has that of all.
    assert [line["model_tflops"] for line in lines_of(tmp_path)] == [32 / 8, (8 + 48) / 2 / 8]
    assert [line["share_of_peak"] for line in lines_of(tmp_path)] == [4 / 8, 3.5 / 8]


def test_numbers_that_are_not_finite_and_times_that_nobody_took_are_valid_json(tmp_path):
    with recorder(tmp_path, total=2, every=1, flops=1e9) as records:
        records.add(1, {"loss": jnp.float32(jnp.nan), "winner": jnp.float32(-jnp.inf), "learning_rate": 1e-4})
        records.add(2, {"loss": jnp.bfloat16(0.5), "winner": 1, "learning_rate": 1e-4})
    first, second = lines_of(tmp_path)
    unknown = dict.fromkeys(("step_seconds", "pairs_per_second_per_chip", "model_tflops"))
    assert first == {"step": 1, "loss": None, "winner": None, "learning_rate": 1e-4, **unknown}
    assert second["loss"] == 0.5
    assert None not in second.values()
    shown = curves_of(tmp_path)[1]
    assert np.isnan(shown["loss"])
    assert np.isneginf(shown["winner"])
    assert not unknown.keys() & shown.keys()


def test_the_progress_bar_shows_loss_pairs_per_second_and_the_time_left(tmp_path, capsys):
    with recorder(tmp_path, total=306, first=300, every=1, show=True) as records:
        for step in range(301, 307):
            records.add(step, metrics_of(float(step)))
    last = capsys.readouterr().err.split("\r")[-1]
    assert re.search(r"306/306 \[\d\d:\d\d<\d\d:\d\d, .*loss=\S+, pairs/s=\d", last)


def test_only_the_first_process_writes_and_shows_but_all_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with recorder(tmp_path, total=3, every=1, show=True) as records:
        records.images(0, np.zeros((1, 4, 4, 3), np.uint8), ["cat"])
        told = [records.add(step, {"skipped_in_a_row": jnp.int32(step)}) for step in (1, 2, 3)]
    assert told == [None, None, {"step": 1, "skipped_in_a_row": 1}]
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().err


def test_a_full_disk_is_told_in_one_line_with_the_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        pytest.raises(OSError, match="free space and run the same command again, which resumes") as told,
        recorder(tmp_path, total=99, every=1) as records,
    ):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            for step in range(1, 99):
                records.add(step, metrics_of(float(step)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.match(rf"{tmp_path}/(metrics.jsonl|tensorboard): cannot be written \(File too large\)", str(told.value))
    train(tmp_path, 4)  # with room it goes on
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4]


def test_a_file_of_others_is_left_alone(tmp_path):
    text = '{"step": 10, "loss": 1.0}\nloss 0.9\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a JSON object with a step; repair or move the file"):
        recorder(tmp_path, total=20)
    assert (tmp_path / "metrics.jsonl").read_text() == text
    with pytest.raises(UserError, match=r"gs://runs/1: metrics need a folder on a disk"):
        recorder("gs://runs/1", total=20)


def test_steps_that_do_not_follow_each_other_are_refused(tmp_path):
    with (
        recorder(tmp_path, total=9, first=4) as records,
        pytest.raises(ValueError, match="step 4, but those of step 5 are expected"),
    ):
        records.add(4, {})
    with pytest.raises(ValueError, match="every=0, lag=2"):
        recorder(tmp_path, total=9, every=0)


def test_an_error_of_training_is_not_hidden_by_metrics_that_never_come(tmp_path):
    class Lost:
        def __array__(self, *_, **__):
            raise AssertionError("fetched")

    with pytest.raises(KeyError, match="the real one"), recorder(tmp_path, total=9) as records:
        records.add(1, {"loss": Lost()})
        raise KeyError("the real one")


def test_samples_are_a_sheet_and_a_picture_of_tensorboard_and_go_with_a_course_that_is_lost(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    with recorder(tmp_path, total=200) as records:
        records.images(0, images, ["a red cat", "a blue dog"])
        records.images(100, images, ["a red cat", "a blue dog"])
    sheets = tmp_path / "samples"
    assert sorted(path.name for path in sheets.iterdir()) == ["000000.png", "000100.png"]
    sheet = np.asarray(Image.open(sheets / "000100.png"))
    enlarged = images[1].repeat(8, 0).repeat(8, 1)
    assert any(
        np.array_equal(sheet[top : top + 128, left : left + 128], enlarged)
        for top, left in np.argwhere((sheet == images[1, 0, 0]).all(-1))
    )
    (shown,) = (value.image for event in events_of(tmp_path) for value in event.summary.value if event.step == 100)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))), sheet)
    assert (shown.height, shown.width) == sheet.shape[:2]
    recorder(tmp_path, total=200, first=50).close()
    assert [path.name for path in sheets.iterdir()] == ["000000.png"]


# ----------------------------------------------------------------------------------------------------------------------
# Profile and memory


@pytest.mark.parametrize(("first", "steps", "begin", "traced"), [(3, 2, 1, {3, 4}), (6, 9, 1, {6, 7}), (2, 4, 5, {5})])
def test_a_profile_has_the_steps_that_were_asked_for_and_no_others(tmp_path, capsys, first, steps, begin, traced):
    state = jnp.ones(3)
    with Profile(tmp_path, first, steps) as profile:
        for step in range(begin, 8):
            profile.at(step, state)
            with jax.profiler.StepTraceAnnotation("step", step_num=step):
                state = state + 1
    (file,) = tmp_path.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert {int(event["args"]["step_num"]) for event in events if event.get("name") == "step"} == traced
    assert capsys.readouterr().out.startswith(f"{tmp_path}/profile: profile from step {first} on")


def test_a_profile_of_steps_that_are_over_or_of_none_is_not_made(tmp_path):
    with Profile(tmp_path, 1, 2) as profile:
        profile.at(7, ())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="profile of 0 steps from step 1"):
        Profile(tmp_path, 1, 0)


def test_the_budget_adds_up_and_warns_when_a_device_is_too_small():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    large = AbstractMesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    halves = jax.ShapeDtypeStruct((2048, 1024), jnp.bfloat16, sharding=NamedSharding(large, PartitionSpec("fsdp")))
    held = {
        "frozen weights": {"conv": halves, "norm": np.zeros(256, np.float32)},
        "keys": jax.random.split(jax.random.key(0), 4),
    }
    arguments = 2**21 + 1024 + 32
    memory = SimpleNamespace(
        argument_size_in_bytes=arguments + 2**20,  # padding
        temp_size_in_bytes=3 * 2**20,
        output_size_in_bytes=arguments + 512,
        alias_size_in_bytes=arguments,
        generated_code_size_in_bytes=0,
    )
    assert budget(mesh, held, memory, limit=4 * 2**20).splitlines() == [
        f"mesh data=1, fsdp=1: 1 {jax.devices()[0].device_kind} on 1 host, 4.00 MiB each",
        "                         numbers    in all  per device",
        "frozen weights         2,097,408  4.00 MiB    2.00 MiB",
        "keys                           4      32 B        32 B",
        "activations and other                         4.00 MiB",
        "total                                         6.00 MiB",
        "warning: 2.00 MiB more than a device has; a larger fsdp axis, fewer pairs per device or lower precision "
        "need less",
    ]
    assert "warning" not in budget(mesh, held, memory, limit=2**30)
    assert budget(mesh, held, None).splitlines()[-1].split() == ["total", "2.00", "MiB"]


def test_the_budget_agrees_with_a_program_that_takes_over_what_it_is_given():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    state = jnp.ones((256, 1024))
    compiled = jax.jit(lambda x: x + 1, donate_argnums=0).lower(state).compile()
    assert budget(mesh, {"state": state}, compiled.memory_analysis(), memory_limit(mesh)).count("1.00 MiB") == 3


if __name__ == "__main__":
    train(Path(sys.argv[1]), 30, killed_at=26)
