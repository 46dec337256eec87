"""`python -m sample.score`: as a function where that is quick, and as a process on several devices."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flax_pref.config import UserError
from flax_pref.data.prompts import Prompt
from flax_pref.evaluation import run_scoring
from flax_pref.evaluation.score_flags import ScoreFlags
from flax_pref.images.image_set import ImageSet, Item
from flax_pref.world import judge
from flax_pref.world import scenes as world
from sample import score

ROOT = Path(__file__).parents[1]
CAPTIONS = [f"a {size} {colour} circle in the middle, white background" for size in ("small", "large") for colour in (
    "red", "blue", "green")]  # fmt: skip
calls = []


def strange(images, captions):
    """A reward of its own: how red an image is, NaN for black ones; the program can be told to end while it works."""
    calls.append(len(captions))
    if len(calls) == strange.ends_after:
        os.kill(os.getpid(), signal.SIGTERM)
    if len(calls) == strange.fails_after:
        raise OverflowError("too red")
    red = images[..., 0].mean((1, 2))
    return np.where(red == 0, np.nan, red)


strange.ends_after = strange.fails_after = None
STRANGE = f"red=python:{__name__}:strange"


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    calls.clear()
    monkeypatch.setattr(strange, "ends_after", None)
    monkeypatch.setattr(strange, "fails_after", None)


def draw_run(folder, captions=CAPTIONS, seeds=2, black=()):
    """A finished run of drawings; those of some prompts are black."""
    items = [Item(Prompt(i, text, "", {"prompt": text}), s) for i, text in enumerate(captions) for s in range(seeds)]
    scene = world.parse(CAPTIONS[0])
    pixels = [world.render(scene, np.random.default_rng((item.prompt.id, item.seed))) for item in items]
    pixels = np.stack([np.round(255 * np.asarray(image)).astype(np.uint8) for image in pixels])
    pixels[[item.prompt.id in black for item in items]] = 0
    images = ImageSet(folder, items, {}, layout="webdataset")
    images.begin()
    images.write(range(len(items)), pixels)
    images.finish()
    return items, pixels


def table(folder):
    return pq.read_table(Path(folder) / "scores.parquet")


def column(folder, name):
    return table(folder)[f"score:{name}"].to_pylist()


def test_runs_are_scored_with_several_rewards_and_the_means_told(tmp_path, capsys):
    items, pixels = draw_run(tmp_path / "a", black=(1,))
    draw_run(tmp_path / "b")
    flags = [str(tmp_path / "a"), str(tmp_path / "b"), "--rewards", "judge", "compressibility", STRANGE]
    score.main([*flags, "--batch-size", "5"])
    told = capsys.readouterr().out
    wanted = np.asarray(judge.score(pixels.astype(np.float32) / 255, judge.question([i.prompt.text for i in items])))
    np.testing.assert_allclose(column(tmp_path / "a", "judge"), wanted, rtol=1e-4)  # that is compiled otherwise
    assert max(column(tmp_path / "b", "compressibility")) < -0.5  # kB
    red = column(tmp_path / "a", "red")
    np.testing.assert_allclose(red[0], pixels[0, ..., 0].mean() / 255, rtol=1e-5)
    assert np.isnan(red[2:4]).all() and table(tmp_path / "a")["score:red"].null_count == 0
    assert f"{tmp_path}/a: 12 images, scores in {tmp_path}/a/scores.parquet" in told
    finite = [value for value in red if np.isfinite(value)]
    assert f"  red: mean {np.mean(finite):.6g} of 10 images, 2 not finite\n" in told
    # Once more: no reward is even loaded.
    written, asked = (tmp_path / "a/scores.parquet").stat().st_mtime_ns, len(calls)
    score.main([*flags, "--batch-size", "5"])
    told = capsys.readouterr().out
    assert "nothing to do" in told and "loading" not in told and "2 not finite" in told
    assert ((tmp_path / "a/scores.parquet").stat().st_mtime_ns, len(calls)) == (written, asked)


def test_hosts_share_out_the_folders(tmp_path, capsys):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        draw_run(folder, captions=CAPTIONS[:1], seeds=1)
    config = ScoreFlags(runs=tuple(map(str, folders)), rewards=(STRANGE,))
    run_scoring.score_part(config, 1, 2)
    assert [(folder / "scores.parquet").exists() for folder in folders] == [False, True, False]
    run_scoring.score_part(config, 0, 2)
    assert [(folder / "scores.parquet").exists() for folder in folders] == [True, True, True]
    assert len(calls) == 3, "none is scored twice"
    run_scoring.score_part(config, 3, 4)
    assert "process 3 of 4: fewer folders than processes" in capsys.readouterr().out


def test_told_to_end_it_finishes_the_batch_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    draw_run(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "whole")
    flags = ["--rewards", STRANGE, "judge", "--batch-size", "2"]
    score.main([str(tmp_path / "whole"), *flags])
    calls.clear()
    monkeypatch.setattr(strange, "ends_after", 2)
    score.main([str(tmp_path / "a"), *flags])
    left = int(re.search(r"red: .*stopped with (\d+) left; the same command resumes", capsys.readouterr().out)[1])
    assert left == table(tmp_path / "a")["score:red"].null_count and 2 <= left <= 8
    assert "score:judge" not in table(tmp_path / "a").column_names
    before = len(calls)
    score.main([str(tmp_path / "a"), *flags])
    assert len(calls) - before == left // 2
    assert (tmp_path / "a/scores.parquet").read_bytes() == (tmp_path / "whole/scores.parquet").read_bytes()


def test_a_reward_that_fails_ends_it_with_one_line_and_what_was_scored_is_kept(tmp_path, monkeypatch):
    draw_run(tmp_path)
    monkeypatch.setattr(strange, "fails_after", 4)
    with pytest.raises(UserError) as told:
        score.main([str(tmp_path), "--rewards", STRANGE, "--batch-size", "2"])
    assert re.fullmatch(rf"{tmp_path}: red: .*OverflowError: too red; what is scored is kept, .*", str(told.value))
    assert table(tmp_path)["score:red"].null_count <= 6


def test_a_reward_of_another_file_under_the_same_name_is_computed_anew_and_told(tmp_path, capsys, monkeypatch):
    draw_run(tmp_path / "run")
    score.main([str(tmp_path / "run"), "--rewards", STRANGE])
    monkeypatch.setattr(
        run_scoring, "identity", lambda name, path, config: {"name": name, "sha256": "cd", "dtype": "float32"}
    )
    score.main([str(tmp_path / "run"), "--rewards", STRANGE])
    assert re.search("run: red is computed again: was .*sha256=, now sha256=cd", capsys.readouterr().out)
    described = json.loads(table(tmp_path / "run").schema.metadata[b"flax_pref"])
    assert described["rewards"]["red"]["sha256"] == "cd"


def test_weights_are_known_by_their_contents(tmp_path):
    config = ScoreFlags(runs=("a",), rewards=("aesthetic",), clip=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"1")
    (tmp_path / "README.md").write_bytes(b"1")
    before = run_scoring.identity("aesthetic", str(tmp_path / "model.safetensors"), config)
    (tmp_path / "README.md").write_bytes(b"2")
    assert run_scoring.identity("aesthetic", str(tmp_path / "model.safetensors"), config) == before
    (tmp_path / "pytorch_model.bin").write_bytes(b"2")
    after = run_scoring.identity("aesthetic", str(tmp_path / "model.safetensors"), config)
    assert before["path"] == "model.safetensors" and after["sha256"] == before["sha256"]
    assert after["clip_sha256"] != before["clip_sha256"]


def test_scores_of_hpsv2_by_versions_that_rounded_are_computed_again():
    config = ScoreFlags(runs=("a",), rewards=("hpsv2.1",))
    assert run_scoring.identity("hpsv2.1", None, config)["resized"] == "unrounded"
    assert "resized" not in run_scoring.identity("pickscore", None, config)
    assert "resized" not in run_scoring.identity("hpsv2.1", "http://localhost/score", config)


def test_foreign_images_are_scored_with_the_prompts_of_a_file(tmp_path, capsys):
    draw_run(tmp_path / "drawn", seeds=1)
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    flags = ["--rewards", "judge", "--prompts", str(tmp_path / "prompts.txt")]
    with tarfile.open(tmp_path / "drawn/00000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".png")]
        tar.extractall(tmp_path / "foreign", members, filter="data")
    score.main([str(tmp_path / "foreign"), *flags])
    assert "foreign: no manifest; 6 images, prompts by the number in the file name\n" in capsys.readouterr().out
    score.main([str(tmp_path / "drawn"), "--rewards", "judge"])
    assert column(tmp_path / "foreign", "judge") == column(tmp_path / "drawn", "judge")


def test_several_devices_share_the_images_and_find_the_same_scores(tmp_path):
    draw_run(tmp_path / "one")
    (tmp_path / "large").mkdir()
    for i in range(4):  # so large that JAX copies them in threads, of which it has few
        noise = np.random.default_rng(i).integers(0, 256, (300, 300, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"large/{i}.png")
        (tmp_path / f"large/{i}.txt").write_text("noise")
    calls = [["one", "--rewards", "judge", "compressibility"], ["large", "--rewards", "compressibility"]]
    for folder in ("one", "large"):
        shutil.copytree(tmp_path / folder, tmp_path / f"{folder}8")
    for folder, *flags in calls:
        score.main([str(tmp_path / folder), *flags, "--batch-size", "1"])
    program = "import sys, json; from sample.score import main; [main(flags) for flags in json.loads(sys.argv[1])]"
    flags = [[str(tmp_path / f"{folder}8"), *flags, "--batch-size", "1"] for folder, *flags in calls]
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8"},
    )
    assert done.returncode == 0, done.stderr
    assert "loading judge on 8 x cpu" in done.stdout
    for folder, name in (("one", "judge"), ("one", "compressibility"), ("large", "compressibility")):
        alone = column(tmp_path / folder, name)
        np.testing.assert_allclose(column(tmp_path / f"{folder}8", name), alone, rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rewards", "judge"], "no folder to score; expected one or more"),
        (["a"], "nothing to score with; expected --rewards with one or more of clip, "),
        (["a", "--rewards", "pikscore"], "no reward 'pikscore'; expected one of clip, pickscore"),
        (["a", "--rewards", "clip="], "--rewards clip=: expected NAME or NAME=PATH"),
        (["a", "--rewards", "clip=/no/such"], "no file or folder /no/such; correct the path"),
        (["a", "--rewards", "judge", "judge"], "judge is there twice; expected each once"),
        (["a", "--features", "dinov2=x.pt"], "no file or folder x.pt"),
        (["a", "--rewards", "judge", "--batch-size", "0"], "--batch-size 0: expected at least 1"),
        (["/no/such", "--rewards", "judge"], "/no/such: no such folder"),
        (["RUN", "/no/such", "--rewards", "judge"], "/no/such: no such folder"),
        (["RUN", "--rewards", "judge", "--prompts", "/no/such.txt"], "/no/such.txt"),
        (["RUN", "--rewards", "judge", "--column", "text"], "--column text: is of a file of prompts"),
        (["RUN", "--rewards", "clip", "--tokenizer", "/no/such"], "--tokenizer /no/such: no file or folder /no/such"),
        (["RUN", "--rewards", "clip", "--tokenizer", "pick=a/b"], "no reward 'pick' is asked for; expected of clip"),
        (["RUN", "--rewards", "clip", "--clip", "a/b"], "--clip a/b: is of aesthetic, which is not asked for"),
        (["RUN", "--rewards", "aesthetic", "--clip", "/no"], "--clip /no: no file or folder /no"),
        (["RUN", "--rewards", "judge"], "RUN: judge: prompt 'a horse': not a caption of the demo world"),
        (
            ["RUN", "--features", "judge"],
            "--features judge: no network 'judge' for features; expected one of clip",
        ),
        (["RUN", "--features", "clip=http://localhost"], "no file or folder http://localhost"),
        (["RUN", "--features", "dinov2="], "--features dinov2=: expected NAME or NAME=PATH"),
        (["RUN", "--features", "clip", "clip"], "--features: clip is there twice; expected each once"),
        (
            ["RUN", "--features", "inception"],
            "--features inception: needs the path of its weights, inception=PATH",
        ),
        (["RUN", "--rewards", "compressibility", "--mesh", "data=3"], "mesh 'data=3': does not make up 1 devices"),
    ],
)
def test_what_a_user_got_wrong_is_told_in_one_line(flags, message, tmp_path, monkeypatch):
    draw_run(tmp_path, ["a horse"], seeds=1)
    monkeypatch.setattr(run_scoring, "fingerprint", None)  # weights are not even read for their hash
    with pytest.raises((UserError, ValueError, OSError)) as told:
        score.main([str(tmp_path) if flag == "RUN" else flag for flag in flags])
    assert re.search(message.replace("RUN", str(tmp_path)), str(told.value)) and "\n" not in str(told.value)
    assert not (tmp_path / "scores.parquet").exists()
