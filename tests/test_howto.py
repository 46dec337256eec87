"""The pages "add a rule", "add a method" and "add a reward": what they say is done, in a copy of the project."""

import os
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from pages import ROOT, blocks
from PIL import Image
from training.tiny import tiny_checkpoint, tiny_set

from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.checkpoints.lora import lora_network, save_lora
from flax_pref.data.images import encode_jpeg
from flax_pref.data.pick_a_pic import LabelledPair, write_pairs
from flax_pref.models.lora import select_lora, split_lora

CAPTIONS = ("a red circle", "a blue square")
# Flags that make a program's work small, by the program and what it reads.
TRAINING = "--model tiny --steps 2 --optimizer.warmup-steps 1"
SMALL = {
    "sample": "--model tiny --steps 2",
    "score": "",
    "train configs/demo/ipo.py": f"{TRAINING} --data tiny_set --input.batch-size 4",
    "train demo/tailorpo": (
        f"{TRAINING} --online.size 16 16 --online.rollouts.prompts 2 --online.rollouts.at-once 2"
        " --online.rollouts.batch-size 2 --method.steps 3 --method.train-steps 3"
    ),
}


def test_a_rule_of_the_page_has_at_most_twelve_lines():
    (file,) = [block for block in blocks("docs/howto/rule.md") if block.file]
    assert len(file.text.splitlines()) <= 12


@pytest.mark.recipe
@pytest.mark.parametrize("page", ["rule", "method", "reward"])
def test_what_the_page_says_is_done_in_a_copy_of_the_project(page, tmp_path):
    project, work = tmp_path / "project", tmp_path / "work"
    for folder in ("flax_pref", "configs"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    runs = work / "runs"
    base = load_pipeline(tiny_checkpoint(work / "tiny", "sd15")).unet
    tiny_set(work / "tiny_set", "sd15")
    save_modules(base, runs / "demo")
    save_pairs(runs / "demo" / "pairs.parquet")
    save_images(runs / "images")
    for language, title, text in blocks(f"docs/howto/{page}.md"):
        file = (project if title.startswith("flax_pref/") else work) / title
        if language == "diff":
            apply(file, text)
        elif title:
            assert not file.exists()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        elif language == "python":
            run(project, work, "-c", text)
        else:
            for command in text.replace("\\\n", " ").splitlines():
                name, program, *arguments = shlex.split(command)
                assert name == "flax-pref"
                small = SMALL[program] if program in SMALL else SMALL[f"{program} {arguments[0]}"]
                # -P: the command itself, unlike `python -m`, does not find modules in the current folder.
                run(project, work, "-P", "-m", "flax_pref.cli", program, *arguments, *small.split())
    for pattern in WRITTEN[page]:
        assert list(runs.glob(pattern)), pattern


# What the commands of each page leave.
WRITTEN = {
    "rule": ("half_negative/*.png",),
    "method": ("demo/ipo/modules/ipo.safetensors", "ipo/*.png"),
    "reward": (
        "images/scores.parquet",
        "demo/colourful_function/modules/tailorpo.safetensors",
        "demo/colourful/modules/tailorpo.safetensors",
    ),
}


def apply(file, diff):
    """Adds each line with a plus behind the line before it."""
    before, text = None, file.read_text()
    for line in diff.splitlines():
        if line.startswith("+"):
            assert text.count(f"{before}\n") == 1, f"{file} has not {before!r} once"
            text = text.replace(f"{before}\n", f"{before}\n{line[1:]}\n")
        before = line[1:]
    file.write_text(text)


def run(project, folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr[-2000:]}"


def save_modules(base, folder):
    folder.mkdir(parents=True)
    _, lora = split_lora(lora_network(base, ("pos", "neg"), rank=2, alpha=2, key=jax.random.key(0)).params)
    for i, name in enumerate(("pos", "neg")):
        save_lora(select_lora(lora, i), folder / f"{name}.safetensors", alpha=2)


def save_pairs(file):
    rng = np.random.default_rng(0)
    image = encode_jpeg(rng.random((16, 16, 3)))
    pairs = (LabelledPair(CAPTIONS[i % 2], image, image, 1.0, f"{i}-0", f"{i}-1", "base", "base") for i in range(8))
    write_pairs(file, pairs)


def save_images(folder):
    folder.mkdir()
    for i, caption in enumerate(CAPTIONS):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
