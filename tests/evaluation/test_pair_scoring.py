"""Scores of the pairs of prepared sets: what they are, and that kills, hosts or another source change none.

As a program, this file scores a set and is killed on the way: `python FILE SET CHANGE`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from flax_pref.config import UserError
from flax_pref.data.encode import Encoding
from flax_pref.data.encode_set import encode_set
from flax_pref.data.images import decode_image, encode_jpeg
from flax_pref.data.pick_a_pic import LabelledPair, write_pairs
from flax_pref.data.preparation import EncodeConfig
from flax_pref.data.prepared import PreparedSet
from flax_pref.data.sources import Source
from flax_pref.evaluation import run_scoring
from flax_pref.evaluation.score_flags import ScoreFlags
from flax_pref.rewards.reward import load_reward, scores_of
from flax_pref.world import scenes as world

ROOT = Path(__file__).parents[2]
CAPTIONS = [f"a {size} {colour} circle in the middle, white background" for size in ("small", "large") for colour in (
    "red", "blue", "green")]  # fmt: skip
COUNT, DAMAGED, TIES = 14, (5,), (2,)
WINNERS = [i for i in range(COUNT) if i not in (*DAMAGED, *TIES)]
calls = []


def red(images, captions):
    """A reward of its own: how red an image is."""
    calls.append(len(captions))
    if len(calls) == red.ends_after:
        os.kill(os.getpid(), signal.SIGTERM)
    if len(calls) == red.fails_after:
        raise OverflowError("too red")
    return images[..., 0].mean((1, 2))


def level(images, captions):
    """Finds all images equal, except that black ones have no score."""
    return np.where(images.mean((1, 2, 3)) < 0.01, np.nan, 1.0)


red.ends_after = red.fails_after = None
RED, LEVEL = (f"{function.__name__}=python:test_pair_scoring:{function.__name__}" for function in (red, level))
REWARDS = ("judge", RED, LEVEL)


@pytest.fixture(autouse=True)
def again(monkeypatch):
    calls.clear()
    monkeypatch.setattr(red, "ends_after", None)
    monkeypatch.setattr(red, "fails_after", None)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(sys.modules, "test_pair_scoring", sys.modules[__name__])


@functools.cache
def image(number, size=64):
    """JPEG of a drawing; number 18, of pair 9, is black."""
    scene = world.parse(CAPTIONS[number // 2 % len(CAPTIONS)] if number % 3 else CAPTIONS[number % 5])
    pixels = np.asarray(world.render(scene, np.random.default_rng(number)))
    pixels = np.zeros_like(pixels) if number == 18 else pixels
    return encode_jpeg(np.kron(pixels, np.ones((size // 64, size // 64, 1))))


def images_of(i):
    first, second = image(2 * i), image(2 * i + 1)
    return (first[:200], second) if i in DAMAGED else (first, second)


def label(i):
    return 0.5 if i in TIES else float(i % 2)


def write_source(file, count=COUNT, **changed):
    rows = (
        LabelledPair(CAPTIONS[i % len(CAPTIONS)], *images_of(i), label(i), f"{i}-0", f"{i}-1", "base", "base")
        for i in range(count)
    )
    write_pairs(
        file, (dataclasses.replace(row, **changed) if i == 3 else row for i, row in enumerate(rows)), rows_per_group=3
    )
    return file


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A source, and the set that was encoded from it."""
    folder = tmp_path_factory.mktemp("encoded")
    encode_set(
        EncodeConfig(
            output=folder / "set",
            model="demo",
            source=Source(layout="pick_a_pic", path=str(write_source(folder / "source.parquet"))),
            encoding=Encoding(size=(64, 64), batch_size=8),
            max_drop_share=0.2,
            shard_size=4,
        )
    )
    return folder


@pytest.fixture
def folder(encoded, tmp_path):
    """A copy of the set."""
    return shutil.copytree(encoded / "set", tmp_path / "set")


def score(folder, *rewards, **flags):
    work = ScoreFlags(runs=(str(folder),), rewards=rewards or REWARDS, mesh="data=1", **{"batch_size": 3} | flags)
    return run_scoring.score_runs(work).get(str(folder), {})


def files(folder):
    """SHA-256 of all that scoring writes."""
    found = [file for name in ("scores", ".scores") for file in (folder / name).rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def described(folder, name):
    return json.loads(pq.read_schema(folder / "scores" / f"{name}.parquet").metadata[b"flax_pref"])


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def test_both_images_of_every_pair_are_scored_in_the_order_of_the_set(folder, capsys):
    before = PreparedSet(folder).fingerprint
    scores = score(folder)
    rows = [int(PreparedSet(folder).pair(i)["row"]) for i in range(len(WINNERS))]
    assert rows == WINNERS
    for name in ("judge", "red"):
        table = pq.read_table(folder / "scores" / f"{name}.parquet")
        assert table.column_names == ["row", "winner", "loser"] and table["row"].to_pylist() == rows
        reward = load_reward(name, None if name == "judge" else RED.partition("=")[2])
        for i, row in enumerate(rows):
            place = 0 if label(row) == 1 else 1
            pixels = [np.asarray(decode_image(image(2 * row + side))) for side in (place, 1 - place)]
            captions = [CAPTIONS[row % len(CAPTIONS)]] * 2
            seen = reward.view(jnp.asarray(np.stack(pixels), jnp.float32) / 255)
            expected = scores_of(reward, seen, reward.prepare(captions))
            np.testing.assert_allclose(scores[name][i], expected, rtol=2e-5)
            assert (table["winner"][i].as_py(), table["loser"][i].as_py()) == tuple(scores[name][i].tolist())
        assert described(folder, name)["reward"]["name"] == name and described(folder, name)["set"] == before
    assert np.isnan(scores["level"][rows.index(9)]).tolist() == [label(9) == 1, label(9) == 0]
    assert PreparedSet(folder).fingerprint == before
    said = capsys.readouterr().out
    agree = {name: values[:, 0] > values[:, 1] for name, values in scores.items()}
    assert f"judge agrees with the label on {100 * agree['judge'].mean():.1f} %\n" in said
    assert "level agrees with the label on 0.0 % (11 equal, 1 not a number)" in said
    both = sum(agree["judge"] & agree["red"])
    assert "of judge, level, red agree with the label: 3 of 3 on 0.0 % (0), at least 2 on" in said
    assert f"at least 2 on {100 * both / 12:.1f} % ({both})" in said


def test_a_set_is_scored_once_and_a_reward_added_without_scoring_the_others_again(folder, capsys):
    score(folder, RED)
    before, called = files(folder), len(calls)
    score(folder, RED)
    assert "all pairs are scored; nothing to do" in capsys.readouterr().out and len(calls) == called
    scores = score(folder, RED, "judge")
    assert len(calls) == called and set(scores) == {"red", "judge"}
    assert files(folder).items() > before.items() and not (folder / ".scores").exists()


def test_another_reward_under_the_same_name_is_scored_again_and_told(folder, capsys):
    first = score(folder, RED)["red"]
    second = score(folder, LEVEL.replace("level=", "red="))["red"]
    assert "red is computed again: was path=python:test_pair_scoring:red, now path=python:" in capsys.readouterr().out
    assert not np.array_equal(first, second) and described(folder, "red")["reward"]["path"].endswith(":level")


def test_images_of_several_sizes_are_scored_as_they_are(tmp_path):
    sides = [[image(2 * i + side, 64 * (1 + (i + side) % 2)) for side in (0, 1)] for i in range(4)]
    rows = [LabelledPair(CAPTIONS[i], *sides[i], 1.0, f"{i}-0", f"{i}-1", "base", "base") for i in range(4)]
    write_pairs(tmp_path / "a.parquet", rows)
    source = Source(layout="pick_a_pic", path=str(tmp_path / "a.parquet"))
    encode_set(EncodeConfig(output=tmp_path / "set", model="demo", source=source, encoding=Encoding(size=(64, 64))))
    scores = score(tmp_path / "set", "compressibility")["compressibility"]
    reward = load_reward("compressibility")
    for i, side in itertools.product(range(4), (0, 1)):
        pixels = np.asarray(decode_image(sides[i][side]))[None] / 255
        expected = reward.score(reward.view(jnp.asarray(pixels, jnp.float32)), reward.prepare(["a"]))
        np.testing.assert_allclose(scores[i, side], expected[0], rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Kills and hosts


class Kill(BaseException):
    """Ends a run as a signal would, as far as one process can."""


def test_killed_before_a_file_changes_and_begun_again_the_scores_are_the_same(folder, tmp_path, monkeypatch):
    """Every third change of a file is a place to be killed at: of shards, of what they become, and of their removal."""
    rewards = (RED, LEVEL)
    score(calm := shutil.copytree(folder, tmp_path / "calm"), *rewards)
    expected, replace, unlink, left = files(calm), os.replace, Path.unlink, -1

    def dies(real):
        def change(first, *rest, **options):
            nonlocal left
            if "scores" in str(first):
                left -= 1
                if left == -1:
                    raise Kill
            return real(first, *rest, **options)

        return change

    monkeypatch.setattr(os, "replace", dies(replace))
    monkeypatch.setattr(Path, "unlink", dies(unlink))
    for survived in itertools.count(step=3):
        killed, left = shutil.copytree(folder, tmp_path / f"{survived}"), survived
        with contextlib.suppress(Kill):
            score(killed, *rewards)
            break
        left = -1
        score(killed, *rewards)
        assert files(killed) == expected and not (killed / ".scores").exists(), survived
        shutil.rmtree(killed)
    assert survived > 2 * 4 + 2 + 2 * 4 - 3, "shards, files and the parts that are removed"


def test_sigterm_ends_scoring_and_the_same_command_resumes(folder, tmp_path, monkeypatch, capsys):
    score(calm := shutil.copytree(folder, tmp_path / "calm"), RED)
    before = len(calls)
    monkeypatch.setattr(red, "ends_after", before + 4)
    assert score(folder, RED) == {}
    assert "stopped with" in (said := capsys.readouterr().out) and "pairs left; the same command resumes there" in said
    assert files(folder) and not (folder / "scores").exists()
    assert np.array_equal(score(folder, RED)["red"], score(calm, RED)["red"]) and files(folder) == files(calm)
    assert len(calls) < 3 * before, "what was scored is kept"


def test_a_reward_that_fails_is_one_line_and_what_is_scored_is_kept(folder, monkeypatch):
    monkeypatch.setattr(red, "fails_after", 4)
    with pytest.raises(UserError, match=rf"^{folder}: red: OverflowError: too red; what is scored is kept, the same"):
        score(folder, RED)
    assert list(files(folder)) == [".scores/red-00000.parquet"]


def test_processes_score_what_one_scores(folder, tmp_path, monkeypatch):
    score(one := shutil.copytree(folder, tmp_path / "one"), RED, "judge")
    flags = ScoreFlags(runs=(str(folder),), rewards=(RED, "judge"), mesh="data=1", batch_size=3)
    with pytest.raises(FileNotFoundError):  # the parts of the others are not there yet
        run_scoring.score_part(flags, 0, 3)
    for process in (2, 1):
        with pytest.raises(UserError, match="has no scores"):
            run_scoring.score_part(flags, process, 3)
    run_scoring.score_part(flags, 0, 3)
    assert files(folder) == files(one)


def command(folder, *flags):
    return [sys.executable, "-m", "sample.score", str(folder), "--rewards", RED, "compressibility", *flags]


def environment():
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}


@pytest.mark.program
def test_a_process_that_sigkill_ends_again_and_again_resumes_to_the_same_bytes(folder, tmp_path):
    calm = shutil.copytree(folder, tmp_path / "calm")
    options = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True}
    done = subprocess.run(command(calm), **options)
    assert done.returncode == 0, done.stderr[-2000:]
    for change in (0, 1, 2, 5, 6):
        killed = subprocess.run([sys.executable, __file__, str(folder), str(change)], **options)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
        assert not (folder / "scores").is_dir() or not any((folder / "scores").glob("[!.]*")) or change >= 4
    done = subprocess.run(command(folder), **options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert files(folder) == files(calm) and set(files(calm)) == {"scores/red.parquet", "scores/compressibility.parquet"}


@pytest.mark.program
def test_two_hosts_score_what_one_scores(folder, tmp_path):
    calm = shutil.copytree(folder, tmp_path / "calm")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    begin = functools.partial(subprocess.Popen, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    hosts = [begin(command(folder, "--hosts", f"{address},2,{i}")) for i in range(2)]
    hosts.append(begin(command(calm)))
    for host in hosts:
        error = host.communicate(timeout=300)[1]
        assert host.returncode == 0, error[-2000:]
    assert files(folder) == files(calm)


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be scored


def test_a_source_that_has_moved_is_named_and_can_be_given(folder, encoded, tmp_path):
    file = shutil.copy(encoded / "source.parquet", tmp_path / "moved.parquet")
    hidden = (encoded / "source.parquet").rename(encoded / "hidden.parquet")
    try:
        with pytest.raises(UserError, match=r"are not there \(.*source\.parquet.*\); give their path with --source"):
            score(folder, RED)
        assert len(score(folder, RED, source=str(file))["red"]) == len(WINNERS)
    finally:
        hidden.rename(encoded / "source.parquet")


def test_a_source_with_other_labels_or_images_is_refused(folder, tmp_path):
    for changed, message in (
        ({"caption": CAPTIONS[0][:-1]}, "other captions"),
        ({"label_0": 0.0}, "other winners"),
        ({"jpg_0": image(40)}, "other images of shard 0"),
    ):
        source = write_source(tmp_path / "other.parquet", **changed)
        with pytest.raises(UserError, match=rf"^{folder}: the source has changed since .*\({message}"):
            score(folder, RED, source=str(source))
        assert not files(folder)
    shutil.rmtree(folder / ".parts")  # as in a copy without hidden folders
    with pytest.raises(UserError, match=r"the source has changed since the set was encoded \(other images\)"):
        score(folder, RED, source=str(source))
    assert not files(folder)


def test_flags_that_do_not_fit_and_sets_that_cannot_be_scored_are_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_scoring, "load_reward", None)
    runs = tmp_path / "run"
    runs.mkdir()
    for flags, message in (
        ({"features": ("clip",)}, "--features clip: is for folders of images, and .*set is a prepared set"),
        ({"prompts": "a.txt"}, "--prompts a.txt: is for folders of images"),
        ({"runs": (str(folder), str(runs))}, "set is a prepared set, and .*run is not; score them in two calls"),
        ({"runs": (str(runs),), "source": "a"}, "--source a: is for a prepared set, and .*run is none; leave it out"),
        ({"runs": (str(folder), str(folder)), "source": "a"}, "--source a: is of one prepared set"),
    ):
        with pytest.raises(UserError, match=message):
            run_scoring.score_runs(ScoreFlags(**{"runs": (str(folder),), "rewards": ("judge",)} | flags))
    metadata = json.loads((folder / "pairs" / "metadata.json").read_text())
    for name in ("pairs", "captions"):
        without = metadata | {"settings": {"size": [64, 64]}}
        (folder / name / "metadata.json").write_text(json.dumps(without))
    with pytest.raises(UserError, match="its settings do not say what it was encoded from"):
        score(folder, "judge")
    (folder / "pairs" / "metadata.json").unlink()
    with pytest.raises(FileNotFoundError, match="a prepared set, finished by"):
        score(folder, "judge")


def test_a_prompt_that_a_reward_does_not_take_is_told_before_images_are_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("flax_pref.evaluation.pair_scoring.decode_image", None)
    monkeypatch.setattr(world, "parse", lambda caption: (_ for _ in ()).throw(ValueError("no scene")))
    with pytest.raises(UserError, match=rf"^{folder}: judge: prompt 'a .*': no scene"):
        score(folder, "judge")


if __name__ == "__main__":
    target, kill, changes = Path(sys.argv[1]), int(sys.argv[2]), itertools.count()

    def watch(event, arguments):
        if event in ("os.rename", "os.remove") and "scores" in str(arguments[0]) and next(changes) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    from sample import score as program

    program.main(command(target)[3:])
