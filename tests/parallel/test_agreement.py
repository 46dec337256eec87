"""Hosts that were started differently do not begin to work together, and say what differs."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import flax_pref
from flax_pref.config import UserError
from flax_pref.data.prompts import Prompt
from flax_pref.images.image_set import ImageSet, Item
from flax_pref.methods import NPO, DiffusionDPO
from flax_pref.parallel import agreement
from flax_pref.parallel.agreement import LISTED, Content, Fact, agree, begin_together, code, described, differing, flat
from flax_pref.training.trainer import FREE_OF_HOSTS
from tests.training.tiny import tiny_run, tiny_set, tiny_world

ROOT = Path(__file__).parents[2]

# ----------------------------------------------------------------------------------------------------------------------
# The comparison


def compared(*hosts):
    return described(differing([{name: tuple(fact) for name, fact in facts.items()} for facts in hosts]))


def settings(**changes):
    return flat(tiny_run(Path("runs/x"), Path("world"), **changes), free=FREE_OF_HOSTS)


def test_a_setting_is_named_with_the_value_of_every_host():
    assert compared(settings(), settings(seed=1)) == "seed: 0 on host 0, 1 on host 1"
    hosts = [settings(steps=10 if host in (0, 1, 2, 5) else 20) for host in range(7)]
    assert compared(*hosts) == "steps: 10 on hosts 0-2, 5, 20 on hosts 3-4, 6"


def test_settings_within_settings_are_named_as_flags_are_and_methods_count():
    config = tiny_run(Path("runs/x"), Path("world"))
    dropout = dataclasses.replace(config.input, caption_dropout=0.5)
    assert compared(settings(), settings(input=dropout)) == "input.caption_dropout: 0.2 on host 0, 0.5 on host 1"
    assert (
        compared(settings(method=DiffusionDPO(beta=7.0)), settings(method=NPO(beta=7.0)))
        == "method: DiffusionDPO on host 0, NPO on host 1"
    )


def test_what_may_differ_between_hosts_is_not_compared():
    config = tiny_run(Path("runs/x"), Path("world"))
    threads = dataclasses.replace(config.input, threads=5, prefetch=7, workers=1)
    elsewhere = settings(input=threads, hosts="a:1,2,1", host_timeout=9, data=Path("/mnt/data"), model="/mnt/sd15")
    assert compared(settings(hosts="a:1,2,0"), elsewhere) == ""


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(tiny_run(Path("x"), Path("y")))])
def test_every_other_setting_is_compared(name):
    """A field that somebody adds is compared unless they say that it may differ."""
    names = {fact.partition(".")[0] for fact in settings()}
    assert name in names or name in FREE_OF_HOSTS


def test_of_an_input_the_content_counts_and_the_path_is_told():
    here, copy, other = (flat({"data": Content(path, sha)}) for path, sha in (("/a", "0"), ("/b", "0"), ("/c", "1")))
    assert compared(here, copy) == ""
    assert compared(here, other) == "data: /a (SHA-256 0) on host 0, /c (SHA-256 1) on host 1"


def test_a_long_list_and_a_long_value_are_cut():
    first = {f"name{i}": Fact("0") for i in range(LISTED + 2)} | {"only": Fact("x" * 500)}
    text = compared(first, {f"name{i}": Fact("1") for i in range(LISTED + 2)})
    assert text.endswith("; and 3 more") and text.count("on host 1") == LISTED
    assert len(compared(first, {**first, "only": Fact("y")})) < 120
    assert compared(first, {**first, "new": Fact("1")}) == "new: none on host 0, 1 on host 1"


def test_versions_and_every_source_file_are_compared(tmp_path, monkeypatch):
    own = code()
    assert own["version of jax"].value == jax.__version__ and own["jax_enable_x64"].value == "False"
    assert {"flax_pref/training/step.py", "flax_pref/methods/diffusion_dpo.py"} <= own.keys()
    package = tmp_path / "flax_pref"
    shutil.copytree(Path(flax_pref.__file__).parent, package, ignore=shutil.ignore_patterns("base", "__pycache__"))
    monkeypatch.setattr(flax_pref, "__file__", str(package / "__init__.py"))
    assert compared(own, code.__wrapped__()) == "", "a copy of the code elsewhere is the same code"
    with (package / "methods" / "diffusion_dpo.py").open("a") as file:
        file.write("# changed\n")
    version = agreement.metadata.version
    monkeypatch.setattr(agreement.metadata, "version", lambda name: "0.0.1" if name == "jax" else version(name))
    told = compared(own, code.__wrapped__())
    assert f"version of jax: {jax.__version__} on host 0, 0.0.1 on host 1" in told
    assert "flax_pref/methods/diffusion_dpo.py: SHA-256 " in told and "step.py" not in told


def test_of_a_long_path_name_and_hash_are_told():
    ends = [f"{name}.txt (SHA-256 {digit * 12})" for name, digit in (("prompts", "1"), ("others", "2"))]
    told = agreement.described({"prompts": [f"/a/{'long/' * 30}{end}" for end in ends]})
    assert all(end in told for end in ends) and len(told) < 200


def test_alone_nothing_is_computed_or_compared():
    begin_together(None)
    agree(lambda: pytest.fail("asked"))


class Silent:
    """The service that hosts have joined, where the second says nothing."""

    def __init__(self):
        self.said = {}

    def key_value_set(self, key, value):
        self.said[key] = value

    def blocking_key_value_get(self, key, timeout):
        assert timeout < 60_000
        if key not in self.said:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
        return self.said[key]


def test_a_host_that_says_nothing_is_named(monkeypatch):
    """As one with an older version of this package would do."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement.distributed.global_state, "client", Silent())
    with pytest.raises(UserError, match=r"^host 1 does not say in 50 s how it was started; start the same command"):
        begin_together(tiny_run(Path("runs/x"), Path("world")))


# ----------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What two processes said of each case: their errors by its name."""
    folder = tmp_path_factory.mktemp("hosts")
    world = tiny_world(folder / "world")
    tiny_set(world / "other", "sd15", pairs=20)
    (folder / "config.py").write_text(
        "from pathlib import Path\nfrom tests.training.tiny import tiny_run\n"
        f"config = tiny_run(Path({str(folder / 'run')!r}), Path({str(world)!r}))\n"
    )
    pairs = [write_pairs(folder / name, caption) for name, caption in (("pairs", "a cat"), ("others", "a dog"))]
    for name in ("prompts", "others"):
        (folder / f"{name}.txt").write_text(f"a picture of {name}\n")
    drawn = draw_run(folder / "drawn")
    modules = ("train.modules", [str(folder / "config.py")])
    encode = (
        "train.encode",
        [
            *("configs/demo/encode.py", "--model", str(world / "sd15"), "--output", str(folder / "prepared")),
            *("--source.layout", "folder", "--source.path", str(pairs[0]), "--encoding.size", "16", "16"),
        ],
    )
    images = ("sample.images", ["--model", str(world / "sd15"), "--out", str(folder / "images"), "--steps", "2"])
    prompts = ["--prompts", str(folder / "prompts.txt")]
    score = ("sample.score", [str(drawn), "--rewards", "judge"])
    cases = {
        "seed": (modules, [], ["--seed", "1", "--optimizer.learning-rate", "0.5"]),
        "data": (modules, [], ["--data", str(world / "other")]),
        "size": (encode, [], ["--encoding.size", "16", "24"]),
        "source": (encode, [], ["--source.path", str(pairs[1])]),
        "scale": (images, prompts, [*prompts, "--guidance-scale", "3"]),
        "prompts": (images, prompts, ["--prompts", str(folder / "others.txt")]),
        "dtype": (score, [], ["--dtype", "bfloat16"]),
        "rewards": (score, [], ["--rewards", "compressibility"]),
    }
    file = folder / "cases.json"
    file.write_text(
        json.dumps(
            [[n, program, common + first, common + second] for n, ((program, common), first, second) in cases.items()]
        )
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, str(Path(__file__).with_name("mismatched_hosts.py"))]
    processes = [
        subprocess.Popen(
            [*command, f"{address},2,{host}", str(file)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        )
        for host in range(2)
    ]
    found = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-2000:]
            lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            found.append({line["name"]: line for line in lines})
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    left = [path for name in ("run", "prepared", "images") for path in (folder / name).rglob("[!.]*")]
    return found, left


def write_pairs(folder, caption):
    folder.mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (40, 40), colour).save(folder / name)
    pair = {"caption": caption, "winner": "a.png", "loser": "b.png"}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    return folder


def draw_run(folder):
    images = ImageSet(folder, [Item(Prompt(0, "a cat", "", {"prompt": "a cat"}), 0)], {}, layout="flat")
    images.begin()
    images.write([0], np.zeros((1, 16, 16, 3), np.uint8))
    images.finish()
    return folder


@pytest.mark.program
@pytest.mark.parametrize(
    ("case", "differs"),
    [
        ("seed", "optimizer.learning_rate: 0.01 on host 0, 0.5 on host 1; seed: 0 on host 0, 1 on host 1; "),
        ("data", r"data: \S+/sd15-pairs \(SHA-256 \w{12}\) on host 0, \S+/other \(SHA-256 \w{12}\) on host 1; "),
        ("size", r"encoding.size: \(16, 16\) on host 0, \(16, 24\) on host 1; "),
        (
            "source",
            r"source_sha256.captions: \S+/pairs \(SHA-256 \w+\) on host 0, \S+/others \(SHA-256 \w+\) on host 1; ",
        ),
        ("scale", "guidance_scale: 7.5 on host 0, 3 on host 1; "),
        (
            "prompts",
            r"prompts: \S+/prompts.txt \(SHA-256 \w{12}\) on host 0, \S+/others.txt \(SHA-256 \w{12}\) on host 1; ",
        ),
        ("dtype", "dtype: float32 on host 0, bfloat16 on host 1; "),
        ("rewards", "rewards: judge on host 0, compressibility on host 1; "),
    ],
)
def test_hosts_that_were_started_differently_all_end_and_say_what_differs(told, case, differs):
    found, left = told
    for host in found:
        assert re.match(f"the hosts differ in {differs}", host[case]["error"])
        assert host[case]["seconds"] < 60
    assert left == [], "nothing was begun"
