"""`python -m sample.images`: as a function where that is quick, and as a process where it is killed."""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from importlib import resources
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flax_pref.checkpoints.checkpoint import Checkpoint
from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.checkpoints.lora import lora_network, save_lora
from flax_pref.config import UserError
from flax_pref.diffusion import drawing
from flax_pref.files import one_writer
from flax_pref.images.cost import COST, read_cost
from flax_pref.images.image_files import read_metadata
from flax_pref.models.lora import select_lora, split_lora
from sample import images

ROOT = Path(__file__).parents[1]
BASE = str(resources.files("flax_pref.world") / "base")
PROMPTS = [f"a {size} {colour} circle in the middle, white background" for size in ("small", "large") for colour in (
    "red", "blue", "green", "yellow")]  # fmt: skip
QUICK = ("--steps", "2", "--guidance-scale", "3")


@pytest.fixture(scope="session")
def modules(tmp_path_factory):
    """LoRA files of a positive and a negative module, with random weights."""
    folder = tmp_path_factory.mktemp("modules")
    unet = lora_network(load_pipeline(BASE).unet, ("pos", "neg"), rank=2, alpha=2, key=jax.random.key(0))
    _, lora = split_lora(unet.params)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32), lora)
    for i, name in enumerate(("pos", "neg")):
        save_lora(select_lora(lora, i), folder / f"{name}.safetensors", alpha=2)
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


def contents(folder):
    """SHA-256 of every file but the one that tells how long the drawing took."""
    found = {}
    for file in set(Path(folder).rglob("*")) - {Path(folder) / COST}:
        with contextlib.suppress(FileNotFoundError):  # a program that still runs may have removed it
            if file.is_file():
                found[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def drawn(folder):
    """Bytes of each image by (prompt id, seed), as the manifest finds them."""
    found = {}
    for row in pq.read_table(Path(folder) / "manifest.parquet").to_pylist():
        data = (Path(folder) / row["file"]).read_bytes()[row["offset"] :][: row["size"]]
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        found[row["prompt_id"], row["seed"]] = data
    return found


def program(*flags, devices=1, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "sample.images", "--model", "demo", *map(str, flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **environment},
    )


def finish(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err[-2000:]
    return out


def test_a_set_is_drawn_with_modules_into_shards_with_a_manifest(modules, prompts, tmp_path, capsys):
    flags = ("--model", "demo", "--prompts", str(prompts), "--seeds", "0-1", "--rule", "cpgd", "--w", "2", *QUICK)
    flags += ("--module", f"pos={modules}/pos.safetensors", "--module", f"neg={modules}/neg.safetensors")
    images.main([*flags, "--batch-size", "4", "--shard-size", "10", "--out", str(tmp_path / "out")])
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("00000.tar", "00001.tar", "manifest.parquet", "contact_sheet.png", "settings.json", "cost.json", ".lock")
    }
    cost = read_cost(out)
    assert cost.predictions == 6 * 2 and cost.seconds > 0 and cost.devices.endswith("x cpu")
    found = drawn(out)
    assert list(found) == [(i, seed) for i in range(8) for seed in (0, 1)]
    with tarfile.open(out / "00000.tar") as tar:
        assert tar.getnames()[:3] == ["000000-0.txt", "000000-0.json", "000000-0.png"]
        assert tar.extractfile("000000-0.txt").read().decode() == PROMPTS[0]
    metadata = read_metadata(found[7, 1])
    assert metadata["prompt"] == PROMPTS[7]
    assert (metadata["rule"], metadata["w"], str(metadata["seed"])) == ("cpgd", "2", "1")
    row = pq.read_table(out / "manifest.parquet").to_pylist()[0]
    assert row["model_sha256"] == metadata["model_sha256"]
    assert set(json.loads(row["modules_sha256"])) == {"pos", "neg"}
    # Once more: there is nothing to do, and nothing is done.
    before = contents(out)
    images.main([*flags, "--batch-size", "4", "--shard-size", "10", "--out", str(out)])
    assert contents(out) == before
    # A changed byte is seen where images are read, and that image is drawn again.
    with (out / row["file"]).open("r+b") as file:
        file.seek(row["offset"] + row["size"] // 2)
        file.write(bytes([file.read(1)[0] ^ 1]))
    capsys.readouterr()
    images.main([*flags, "--batch-size", "4", "--shard-size", "10", "--out", str(out), "--verify"])
    told = capsys.readouterr().out
    assert "damaged and drawn again: 1 of 16 images (prompt 0 with seed 0)\n" in told and "drew 1 image in" in told
    assert contents(out) == before


@pytest.mark.program
def test_the_modules_and_their_strength_are_in_the_images(modules, tmp_path):
    pos, neg = f"pos={modules}/pos.safetensors", f"neg={modules}/neg.safetensors"
    runs = {
        "base": (),
        "none": ("--rule", "cpgd", "--w", "0", "--module", pos, "--module", neg),
        "cpgd": ("--rule", "cpgd", "--w", "2", "--module", pos, "--module", neg),
        "scheduled": ("--rule", "cpgd", "--w", "list:2:2", "--module", pos, "--module", neg),
        "pgd": ("--rule", "pgd", "--w", "2", "--module", pos),
        "merged": ("--rule", "pgd", "--w", "2", "--merge", "--module", pos),
        "fast": ("--preset", "fast", "--w", "2", "--module", pos, "--module", neg),
        "merged cpgd": ("--rule", "cpgd", "--w", "2", "--merge", "--module", pos, "--module", neg),
        "own base": ("--rule", "pgd", "--w", "2", "--module", pos, "--module-base", BASE),
    }
    pixels = {}
    for name, flags in runs.items():
        out = tmp_path / name
        images.main(["--model", "demo", "--prompt", PROMPTS[0], *QUICK, "--out", str(out), *flags])
        pixels[name] = np.asarray(Image.open(out / "00000-0.png"), float)

    def apart(one, other):
        return np.abs(pixels[one] - pixels[other]).max()

    assert apart("base", "none") <= 1
    assert apart("cpgd", "scheduled") <= 1
    assert apart("fast", "merged cpgd") == 0
    # On the base that they were trained on, the difference of modules is what the modules are.
    assert apart("pgd", "own base") <= 1
    for other in ("base", "pgd"):
        assert apart("cpgd", other) > 3, other
    assert apart("merged", "base") > 3


@pytest.mark.program
def test_a_killed_run_goes_on_to_the_same_files(modules, prompts, tmp_path):
    kill_and_compare(modules, prompts, tmp_path, kills=2)


@pytest.mark.long
def test_a_run_killed_twenty_times_goes_on_to_the_same_files(modules, prompts, tmp_path):
    kill_and_compare(modules, prompts, tmp_path, kills=20)


def kill_and_compare(modules, prompts, tmp_path, kills):
    flags = ("--prompts", prompts, "--seeds", f"0-{3 * kills}", "--rule", "cpgd", "--w", "2", *QUICK)
    flags += ("--module", f"pos={modules}/pos.safetensors", "--module", f"neg={modules}/neg.safetensors")
    flags += ("--batch-size", "4", "--shard-size", "12")
    finish(program(*flags, "--out", tmp_path / "calm"))
    rng, out, alive = random.Random(0), tmp_path / "killed", 0
    for _ in range(kills):
        process, before = program(*flags, "--out", out), contents(out)
        while process.poll() is None and contents(out) == before:  # until it draws
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        alive += process.poll() is None
        process.kill()
        process.communicate()
    finish(program(*flags, "--out", out))
    print(f"{alive} of {kills} runs were killed while they drew")
    assert alive >= kills / 2
    assert contents(out) == contents(tmp_path / "calm")


@pytest.mark.program
def test_sigterm_ends_the_run_after_the_batch_in_hand(prompts, tmp_path):
    flags = ("--prompts", prompts, "--seeds", "0-30", *QUICK, "--batch-size", "8", "--out", tmp_path / "out")
    process = program(*flags)
    while not list((tmp_path / "out").glob(".parts/*.json")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told = finish(process)
    assert "stopped after" in told and "the same command resumes there" in told
    done = int(told.split("stopped after ")[1].split(" of 248")[0])
    assert 0 < done < 248 and done % 8 == 0
    records = (tmp_path / "out" / ".parts").glob("*.json")
    assert sum(len(json.loads(record.read_text())) for record in records) == done
    assert not (tmp_path / "out" / "manifest.parquet").exists()


def hosts(*flags):
    """Two processes of one program."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [program(*flags, "--hosts", f"{address},2,{i}") for i in range(2)]


@pytest.mark.program
def test_two_hosts_write_what_one_writes(prompts, tmp_path):
    # Three shards: the first host has three batches, the second two.
    flags = ("--prompts", prompts, "--seeds", "0-1", *QUICK, "--batch-size", "4", "--shard-size", "6")
    told = [finish(process) for process in hosts(*flags, "--out", tmp_path / "two")]
    assert "wrote 16 images" in told[0] and "wrote" not in told[1]
    finish(program(*flags, "--out", tmp_path / "one"))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    (tmp_path / "two" / "00001.tar").unlink()  # of the second host, so that the first has nothing to draw
    told = [finish(process) for process in hosts(*flags, "--out", tmp_path / "two")]
    assert "drew 0 images" in told[0] and "drew 6 images" in told[1]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.program
def test_sigterm_to_one_of_two_hosts_ends_both_in_order(prompts, tmp_path):
    flags = ("--prompts", prompts, "--seeds", "0-99", *QUICK, "--batch-size", "8", "--shard-size", "8")
    processes = hosts(*flags, "--out", tmp_path / "out")
    while not list((tmp_path / "out").glob(".parts/*.json")):
        assert all(process.poll() is None for process in processes), processes[0].communicate()[1]
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    sent = time.monotonic()
    for process in processes:
        assert re.search(r"stopped after [1-9]\d* of 400 images; the same command resumes there", finish(process))
    assert time.monotonic() - sent < 30
    assert not (tmp_path / "out" / "manifest.parquet").exists()


def test_images_of_one_prompt_are_drawn_without_torch(tmp_path):
    from test_programs import NO_TORCH, run

    flags = ("--model", BASE, "--prompt", "a small red circle in the middle, white background", "a large blue cross")
    done = run("-c", NO_TORCH, "sample.images", *flags, "--steps", "4", "--seeds", "3,4", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "image/s" in done.stderr or "s/image" in done.stderr, "progress with rates"
    files = sorted(tmp_path.glob("0*.png"))
    assert [file.name for file in files] == ["00000-3.png", "00000-4.png", "00001-3.png", "00001-4.png"]
    for file in files:
        image = Image.open(file)
        assert image.size == (64, 64) and np.std(image) > 5
        assert image.text["seed"] == file.stem[-1]
        assert ("white" if file.stem.startswith("00000") else "cross") in image.text["prompt"]
    assert len({file.read_bytes() for file in files}) == 4


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes

DEMO = ("--model", "demo", "--prompt", "a")
DPG_TABLE = str(Path(__file__).parent / "evaluation" / "benchmarks" / "dpg_bench.csv")
DPG = ("--model", "demo", "--prompts", DPG_TABLE, "--layout", "dpg")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "no/such/model", "--prompt", "a"), "no/such/model: no such file or folder"),
        (("--model", "owner/name", "--prompt", "a"), "owner/name: no such file or folder, the Hub cannot be reached"),
        (("--model", "flax_pref/world", "--prompt", "a"), "flax_pref/world/model_index.json: no such file; expected a"),
        (("--model", "README.md", "--prompt", "a"), "README.md: is no file of weights (.safetensors, .ckpt"),
        ((*DEMO, "--step", "3"), "perhaps you meant --steps"),
        ((*DEMO, "--steps", "0"), "--steps 0: expected at least 1"),
        ((*DEMO, "--steps", "5000"), "scheduler_config.json: solver: steps must lie in 1"),
        ((*DEMO, "--height", "30"), "--height 30: expected multiples of 8, e.g. 32"),
        ((*DEMO, "--width", "65"), "--width 65: expected multiples of 8, e.g. 64"),
        ((*DEMO, "--height", "0"), "--height 0: expected at least 1"),
        ((*DEMO, "--batch-size", "0"), "--batch-size 0: expected at least 1"),
        ((*DEMO, "--every", "0"), "--every 0: expected at least 1"),
        ((*DEMO, "--shard-size", "0"), "--shard-size 0: expected at least 1"),
        ((*DEMO, "--seed", "-1"), "--seed -1: expected 0 to 4294967295"),
        ((*DEMO, "--seeds", "0-4294967296"), "--seeds 0-4294967296: expected 0 to 4294967295"),
        ((*DEMO, "--seeds", "0-4294967295"), "--seeds 0-4294967295: expected at most 1,000,000 seeds"),
        ((*DEMO, "--guidance-scale", "-2"), "--guidance-scale -2: expected 0 or more"),
        ((*DEMO, "--guidance-scale", "7@0.8:0.2"), "--guidance-scale 7@0.8:0.2: '7@0.8:0.2' is no strength"),
        ((*DEMO, "--guidance-scale", "7@0.11:0.115"), "none of the 50 steps lies in this part of the trajectory"),
        ((*DEMO, "--guidance-scale", "list:1:2"), "list:1:2: 2 values, but the solver takes 50 steps; expected one"),
        ((*DEMO, "--rule", "pgd", "--w", "list:8:4:0", "--module", f"a={BASE}"), "--w list:8:4:0: 3 values, but"),
        ((*DEMO, "--rule", "pgd", "--w", "nan", "--module", f"a={BASE}"), "w must be finite"),
        ((*DEMO, "--rescale", "1.5"), "--rescale 1.5: expected 0 to 1"),
        ((*DEMO, "--eta", "-0.1"), "--eta -0.1: expected 0 to 1"),
        ((*DEMO, "--eta", "0.5", "--solver", "euler"), "eta=0.5 applies to ddim and tcd only"),
        ((*DEMO, "--rule", "cgf"), "cgf"),
        ((*DEMO, "--solver", "ancestral"), "ancestral"),
        ((*DEMO, "--sigmas", "karras", "--solver", "lcm"), "sigmas=karras applies to"),
        ((*DEMO, "--spacing", "even"), "--spacing even: expected leading, trailing, linspace or timesteps as 999,499"),
        ((*DEMO, "--spacing", "9,5,1"), "--spacing 9,5,1: 3 timesteps for --steps"),
        ((*DEMO, "--attention", "flash"), "--attention flash: is a kernel for TPUs, but JAX runs on cpu here"),
        ((*DEMO, "--attention", "cudnn"), "--attention cudnn: is a kernel for GPUs, but JAX runs on cpu here"),
        ((*DEMO, "--layout", "hpsv2", "--seeds", "0-1"), "layout 'hpsv2' has one image per prompt"),
        ((*DEMO, "--layout", "geneval", "--format", "webp"), "GenEval reads only files named .png"),
        ((*DEMO, "--layout", "geneval2", "--seeds", "0-1"), "layout 'geneval2' has one image per prompt"),
        (
            (*DEMO, "--layout", "dpg"),
            "prompt 0: has no item_id that can be the name of a file, which layout 'dpg' needs",
        ),
        (
            (*DPG, "--seeds", "0-4"),
            "layout 'dpg' has at most 4 images per prompt, in one grid; expected e.g. --seeds 0-3",
        ),
        ((*DPG, "--height", "48", "--width", "32"), "layout 'dpg' has square images, not 32x48"),
        ((*DEMO, "--column", "text"), "--column text: is of a file of prompts"),
        ((*DEMO, "--out", "README.md"), "--out README.md: is a file; expected a folder"),
        ((*DEMO, "--rule", "pgd", "--w", "1", "--module", f"a={BASE}", "--module-base", "no/base"), "no/base: no such"),
        ((*DEMO, "--guidance-scale", "nan"), "guidance_scale must be finite"),
        ((*DEMO, "--rule", "cpgd"), "--rule cpgd needs --w"),
        ((*DEMO, "--rule", "cpgd", "--w", "4"), "--rule cpgd needs a module 'pos'; expected --module pos=PATH"),
        ((*DEMO, "--w", "4"), "--rule cfg has no use for --w"),
        ((*DEMO, "--proxy", "0.7"), "--rule cfg has no use for --proxy; expected --rule chats"),
        ((*DEMO, "--between", "extrapolate"), "--between extrapolate needs --every"),
        (
            (*DEMO, "--module", "dpo=dpo.safetensors"),
            "--rule cfg has no use for module 'dpo', only for none; expected --rule fine_tuned or --rule pgd",
        ),
        (
            (*DEMO, "--module", "pos=p.safetensors", "--module", "neg=n.safetensors"),
            "expected --rule cpgd or --rule cpgd_conditional or --rule npo or --rule chats",
        ),
        (
            (*DEMO, "--rule", "pgd", "--w", "4", "--module", "dpo=p.safetensors", "--module", "x=n.safetensors"),
            "--rule pgd has no use for module 'x', only for dpo; expected --rule fine_tuned or --rule pgd",
        ),
        (
            (*DEMO, "--rule", "cpgd", "--w", "4", *("--module", "pos=p", "--module", "neg=n", "--module", "bad=b")),
            "has no use for module 'bad', only for neg, pos; expected --rule fine_tuned or --rule pgd or --rule auto",
        ),
        ((*DEMO, "--module", "pos.safetensors"), "--module pos.safetensors: expected NAME=PATH"),
        ((*DEMO, "--rule", "pgd", "--w", "1", "--module", "a=nowhere.safetensors"), "nowhere.safetensors: no such"),
        ((*DEMO, "--rule", "pgd", "--w", "up", "--module", "a=b"), "'up' is no strength"),
        ((*DEMO, "--preset", "fast", "--rule", "pgd"), "--preset fast is --rule cpgd, but --rule is pgd"),
        ((*DEMO, "--seeds", "3-0"), "--seeds 3-0: expected a number, a range"),
        ((*DEMO, "--seed", "1", "--seeds", "0-3"), "--seed 1 and --seeds 0-3: expected one of them"),
        ((*DEMO, "--mesh", "data=3"), "mesh 'data=3': does not make up 1 devices"),
        ((*DEMO, "--hosts", "here"), "--hosts here: expected auto, or ADDRESS:PORT"),
        (("--model", "demo"), "expected either --prompt with texts or --prompts"),
        (("--model", "demo", "--prompts", "no.txt"), "no.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_gives_one_line_and_leaves_nothing(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = () if "--out" in flags else ("--out", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["images", *flags, *out])
    monkeypatch.setattr(drawing, "fingerprint", refuse)
    monkeypatch.setattr(Checkpoint, "load", refuse)
    from flax_pref.config import run_main

    try:
        status = run_main(images.main)
    except SystemExit as exit:
        status = exit.code
    assert status
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0], errors
    assert not (tmp_path / "out").exists()


def test_a_second_program_in_the_same_folder_is_told_who_writes_there_and_loads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "load", refuse)
    out = tmp_path / "out"
    out.mkdir()
    message = (
        rf"{out}: another program writes into this folder \(.*; process {os.getpid()} on .*\); wait for it, or end"
    )
    with one_writer(out), pytest.raises(UserError, match=message):
        images.main([*DEMO, *QUICK, "--out", str(out)])
    assert [path.name for path in out.iterdir()] == [".lock"]


def refuse(*arguments, **options):
    raise AssertionError("weights were read before the mistake was told")


def test_after_a_mistake_the_folder_can_be_used_with_other_settings(tmp_path):
    with pytest.raises(UserError, match="multiples of 8"):
        images.main([*DEMO, *QUICK, "--height", "30", "--out", str(tmp_path / "out")])
    images.main([*DEMO, *QUICK, "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"was begun with .*steps=2, now .*steps=3.*choose another --out"):
        images.main([*DEMO, *QUICK, "--steps", "3", "--out", str(tmp_path / "out")])
