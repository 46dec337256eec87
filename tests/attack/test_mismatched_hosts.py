"""Ten pairs of hosts that were started differently: all end, and name what differs with both values."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

from flax_pref.checkpoints.diffusers import load_pipeline, save_pipeline
from tests.parallel.test_agreement import ROOT, draw_run, write_pairs
from tests.training.tiny import tiny_world

pytestmark = pytest.mark.long
BOTH = r"{}: \S.* on host 0, \S.* on host 1"
SECONDS = 60


def address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def begun(command, **options):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **{"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}} | options,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with checkpoints, sets, runs and a config of train.modules."""
    folder = tmp_path_factory.mktemp("hosts")
    world = tiny_world(folder / "world")
    pipeline = load_pipeline(world / "sd15")
    other = pipeline.unet.params
    other["conv_in"]["bias"] = other["conv_in"]["bias"] + 1
    save_pipeline(pipeline, world / "other")
    (folder / "config.py").write_text(
        "from pathlib import Path\nfrom tests.training.tiny import tiny_run\n"
        f"config = tiny_run(Path({str(folder / 'run')!r}), Path({str(world)!r}))\n"
    )
    write_pairs(folder / "pairs", "a cat")
    (folder / "prompts.txt").write_text("a picture\n")
    for name in ("drawn", "redrawn"):
        draw_run(folder / name)
    return folder


def cases(folder):
    """By name: the program, the flags of both hosts, what the second has more, and what is named."""
    world = folder / "world"
    modules = ("train.modules", [str(folder / "config.py")])
    encode = (
        "train.encode",
        [
            *("configs/demo/encode.py", "--model", str(world / "sd15"), "--output", str(folder / "prepared")),
            *("--source.layout", "folder", "--source.path", str(folder / "pairs"), "--encoding.size", "16", "16"),
        ],
    )
    images = ["--out", str(folder / "images"), "--steps", "2", "--prompts", str(folder / "prompts.txt")]
    images = ("sample.images", [*images, "--model", str(world / "sd15")])
    score = ("sample.score", [str(folder / "drawn"), "--rewards", "judge"])
    return {
        "dropout": (*modules, ["--input.caption-dropout", "0.5"], r"input\.caption_dropout"),
        "learning rate": (*modules, ["--optimizer.learning-rate", "0.02"], r"optimizer\.learning_rate"),
        "steps": (*modules, ["--steps", "5"], "steps"),
        "rank": (*modules, ["--lora.rank", "4"], r"lora\.rank"),
        "weights": (*modules, ["--model", str(world / "other")], r"model\S*"),
        "shards": (*encode, ["--shard-size", "7"], "shard_size"),
        "filter of images": (*encode, ["--encoding.resample", "lanczos"], r"encoding\.resample"),
        "seeds": (*images, ["--seeds", "0-1"], "seeds"),
        "weights of images": (*images, ["--model", str(world / "other")], r"model\S*"),
        "dtype of scores": (*score, ["--dtype", "float16"], "dtype"),
    }


def test_settings_data_and_weights_that_differ_are_named_with_both_values(world):
    file = world / "cases.json"
    table = cases(world)
    file.write_text(
        json.dumps([[n, program, common, common + more] for n, (program, common, more, _) in table.items()])
    )
    where, script = address(), ROOT / "tests" / "parallel" / "mismatched_hosts.py"
    hosts = [begun([script, f"{where},2,{host}", file]) for host in range(2)]
    try:
        for host in hosts:
            output, errors = host.communicate(timeout=600)
            assert host.returncode == 0, errors[-2000:]
            found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            assert [case["name"] for case in found] == list(table)
            for case in found:
                assert case["seconds"] < SECONDS, case
                assert re.match("the hosts differ in " + BOTH.format(table[case["name"]][3]), case["error"] or ""), case
    finally:
        for host in hosts:
            host.kill()
    assert not [path for name in ("run", "prepared", "images") for path in (world / name).rglob("[!.]*")]


@pytest.mark.parametrize("differs", ["code", "option of JAX"])
def test_programs_of_other_code_or_options_end_with_an_error(world, differs, tmp_path):
    """As processes of their own, which end with status 1."""
    root, environment, named = ROOT, {}, "jax_default_matmul_precision"
    if differs == "code":
        root, named = tmp_path / "copy", r"flax_pref/methods/diffusion_dpo\.py"
        for name in ("flax_pref", "train", "configs", "tests"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        with (root / "flax_pref" / "methods" / "diffusion_dpo.py").open("a") as source:
            source.write("# changed\n")
    else:
        environment = {"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"}
    where, start = address(), time.monotonic()
    hosts = [
        begun(
            ["-m", "train.modules", world / "config.py", "--hosts", f"{where},2,{host}"],
            cwd=place,
            env=os.environ | {"PYTHONPATH": str(place), "XLA_FLAGS": ""} | more,
        )
        for host, (place, more) in enumerate(((ROOT, {}), (root, environment)))
    ]
    try:
        for host in hosts:
            _, errors = host.communicate(timeout=300)
            last = errors.strip().splitlines()[-1]
            assert host.returncode == 1, errors[-2000:]
            assert re.match("error: the hosts differ in " + BOTH.format(named), last), last
    finally:
        for host in hosts:
            host.kill()
    print(f"{differs}: both ended after {time.monotonic() - start:.0f} s")
    assert not (world / "run").exists() or not [path for path in (world / "run").rglob("[!.]*")]
