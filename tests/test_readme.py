"""What the README, the demo's page and the tutorials tell users to type."""

import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jax
import numpy as np
import pytest
from pages import PAGES, ROOT, blocks, commands, links
from training.tiny import tiny_checkpoint, tiny_scorer, tiny_set

from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.checkpoints.lora import lora_network, save_lora
from flax_pref.data.images import encode_jpeg
from flax_pref.data.pick_a_pic import LabelledPair, write_pairs
from flax_pref.data.prompts import Prompt
from flax_pref.images.image_set import ImageSet, Item
from flax_pref.models.lora import select_lora, split_lora

BASE = resources.files("flax_pref.world") / "base"

# Every Python that a command starts runs this first. The environment of the tests has the libraries, so an import of
# theirs would succeed.
WITHOUT_TORCH = """
import atexit, os, sys

def check():
    loaded = {"torch", "tensorflow", "diffusers", "transformers", "peft"} & set(sys.modules)
    if loaded:
        print("the runtime imported", loaded, file=sys.stderr, flush=True)
        os._exit(99)

atexit.register(check)
"""

# The commands of other pages are parsed, see test_running_docs.py, and those of the how-tos run in test_howto.py.
CHECKED = ("README.md", "docs/demo.md", *(f"docs/tutorials/{name}.md" for name in ("train", "guide", "evaluate")))

ENCODE = "flax-pref encode sd15/encode_pick_a_pic"
SMALL_ENCODE = (
    "flax_pref.cli encode sd15/encode_pick_a_pic --source.path {tmp}/pairs --model demo --encoding.size 64 64"
    " --output {tmp}/prepared"
)
SMALL_TRAINING = " --model {tmp}/tiny --data {tmp}/tiny_pairs --output {tmp}/run --steps 2 --input.batch-size 4"

SCORE = "flax-pref score runs/base runs/cpgd"
SMALL_SCORE = (
    "{python} -m flax_pref.cli score {tmp}/runs/base {tmp}/runs/cpgd --rewards pickscore={tmp}/scorer"
    " hpsv2.1={tmp}/scorer --features clip={tmp}/scorer"
)

DRAW = "flax-pref sample --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.tsv --seeds 0-3"
SMALL_DRAW = "{python} -m flax_pref.cli sample --model demo --prompts {tmp}/prompts.tsv --seeds 0-1 --steps 2"

CONTROLS = "flax-pref controls runs/base runs/cpgd --prompts prompts.tsv"

# Each command of these pages, and how it is run here: the same program and config, less work.
COMMANDS = {
    "make demo": (
        "make demo ARGS='--pairs 8 --w-cpgd 1 --w-pgd 1 --sampling-steps 2 --batch-size 4 --dpo.steps 2"
        " --dpo.batch-size 2 --positive-negative.steps 2 --positive-negative.batch-size 2 --validation-prompts 4"
        " --held-out-prompts 4 --train-prompts 4 --output {tmp}/demo'"
    ),
    "make study": "make study ARGS='--quick --output {tmp}/study'",
    "make test": "make test --dry-run",  # not from within itself
    ('flax-pref sample --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a lighthouse in a storm"'): (
        "{python} -m flax_pref.cli sample --model demo --prompt 'a lighthouse in a storm' --steps 2 --out {tmp}/images"
    ),
    "flax-pref train sd15/dpo": (
        f"{{python}} -m flax_pref.cli train sd15/dpo {SMALL_TRAINING} --mesh data=1 --accumulation 2"
        " --optimizer.warmup-steps 1"
    ),
    "flax-pref score runs/images --rewards pickscore": (
        "{python} -m flax_pref.cli score {tmp}/runs/base --rewards pickscore={tmp}/scorer"
    ),
    f"{DRAW} --module pos=pos.safetensors --module neg=neg.safetensors --rule cpgd --w 4 --steps 25 --out runs/cpgd": (
        f"{SMALL_DRAW} --module pos={{tmp}}/pos.safetensors --module neg={{tmp}}/neg.safetensors --rule cpgd --w 4"
        " --out {tmp}/cpgd"
    ),
    f"{DRAW} --steps 25 --out runs/base": f"{SMALL_DRAW} --out {{tmp}}/base",
    f"{SCORE} --rewards pickscore hpsv2.1 --features clip": SMALL_SCORE,
    "flax-pref report runs/base runs/cpgd --out runs/report": (
        f"{SMALL_SCORE} && {{python}} -m flax_pref.cli report {{tmp}}/runs/base {{tmp}}/runs/cpgd --out {{tmp}}/report"
    ),
    f"{CONTROLS} --validation others.txt --rewards pickscore hpsv2.1": (
        f"{SMALL_DRAW} --out {{tmp}}/base && {SMALL_DRAW} --module pos={{tmp}}/pos.safetensors --module"
        " neg={tmp}/neg.safetensors --rule cpgd --w 4 --out {tmp}/cpgd && {python} -m flax_pref.cli controls {tmp}/base"
        " {tmp}/cpgd --prompts {tmp}/prompts.tsv --validation {tmp}/others.txt --rewards pickscore={tmp}/scorer"
        " hpsv2.1={tmp}/scorer --guidance-scales 2 3 4 --out {tmp}/controls"
    ),
    ".venv/bin/python -m train.encode configs/demo/encode.py": (
        "{python} -m train.encode configs/demo/encode.py --source.path {tmp}/pairs --output {tmp}/prepared"
    ),
    f"{ENCODE} --source.path /data/pickapic_v2": f"{{python}} -m {SMALL_ENCODE}",
    f"{ENCODE} --source.path /data/pickapic_v2 --inspect 32": f"{{python}} -m {SMALL_ENCODE} --inspect 32",
    ".venv/bin/python -m train.modules configs/demo/modules.py": (
        f"{{python}} -m train.modules configs/demo/modules.py {SMALL_TRAINING}"
    ),
    ".venv/bin/python -m train.base configs/demo/base.py": (
        "{python} -m train.base configs/demo/base.py --output {tmp}/base --examples 64"
        " --vae.block-out-channels 4 4 --vae.down-block-types DownEncoderBlock2D DownEncoderBlock2D"
        " --vae.up-block-types UpDecoderBlock2D UpDecoderBlock2D --text-encoder.num-hidden-layers 1"
        " --unet.block-out-channels 16 --unet.down-block-types CrossAttnDownBlock2D"
        " --unet.up-block-types CrossAttnUpBlock2D"
        " --autoencoder.steps 2 --autoencoder.warmup-steps 1 --decoder.steps 2 --decoder.warmup-steps 1"
        " --diffusion.steps 2 --diffusion.warmup-steps 1 --diffusion.batch-size 2"
        " --layout.steps 2 --layout.warmup-steps 1 --layout.batch-size 2"
    ),
}


def test_every_command_of_the_pages_is_run_here():
    assert {command for page in CHECKED for command in commands(page)} == set(COMMANDS)


@pytest.mark.recipe
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_pages_runs(command, tmp_path):
    if command in ("make demo", "make study") and Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("would make a second environment, .venv")
    (tmp_path / "prompts.tsv").write_text("Prompt\tCategory\na red circle\tAbstract\na blue cross\tAbstract\n")
    save_modules(tmp_path)
    save_pairs(tmp_path / "pairs" / "train-00000-of-00001.parquet")
    (tmp_path / "others.txt").write_text("a green ring\n")
    if any(f"flax-pref {program}" in command for program in ("score", "report", "controls")):
        save_runs(tmp_path)
    if "train.modules" in command or "flax-pref train" in command:
        tiny_checkpoint(tmp_path / "tiny", "sd15")
        tiny_set(tmp_path / "tiny_pairs", "sd15")
    shortened = COMMANDS[command].format(python=sys.executable, tmp=tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT_TORCH)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(shortened, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    if command == "make demo":
        assert {path.suffix for path in (tmp_path / "demo").iterdir()} >= {".html", ".json", ".parquet", ".safetensors"}
        assert "held-out prompts" in done.stdout and "step/s" in done.stderr
    if command == "make study":
        evidence = tmp_path / "study" / "quick" / "evidence.md"
        page = evidence.read_text()
        assert "## The methods side by side" in page and "\n| cPGD | " in page
        assert (evidence.parent / "evidence" / "measurements.parquet").is_file()
    if "train.modules" in command or "flax-pref train" in command:
        assert list((tmp_path / "run" / "modules").iterdir()) and "step/s" in done.stderr
    if "flax-pref controls" in command:
        assert (tmp_path / "controls" / "report" / "report.html").is_file()
        assert len(re.findall(r"^(pickscore|hpsv2.1): cpgd is ", done.stdout, re.MULTILINE)) == 2
    if "flax-pref report" in command:
        assert (tmp_path / "report" / "report.html").is_file() and "4 pairs (prompt, seed) of 2 prompts" in done.stdout
    if "train.encode" in command or "flax-pref encode" in command:
        expected = "inspection.html" if "--inspect" in command else "pairs/dataset_info.json"
        assert (tmp_path / "prepared" / expected).is_file() and "4 pairs" in done.stdout


def save_runs(folder):
    """Two runs of two prompts with two seeds, and a small network to score them with."""
    tiny_scorer(folder / "scorer")
    prompts = [Prompt(i, text, "", {"prompt": text}) for i, text in enumerate(("a cat", "a dog"))]
    items = [Item(prompt, seed) for prompt in prompts for seed in range(2)]
    for seed, name in enumerate(("base", "cpgd")):
        images = ImageSet(folder / "runs" / name, items, {})
        images.begin()
        images.write(range(len(items)), np.random.default_rng(seed).integers(0, 256, (len(items), 16, 16, 3), np.uint8))
        images.finish()


def save_modules(folder):
    unet = lora_network(load_pipeline(BASE).unet, ("pos", "neg"), rank=2, alpha=2, key=jax.random.key(0))
    _, lora = split_lora(unet.params)
    for i, name in enumerate(("pos", "neg")):
        save_lora(select_lora(lora, i), folder / f"{name}.safetensors", alpha=2)


def save_pairs(file):
    image = encode_jpeg(np.random.default_rng(0).random((64, 64, 3)))
    write_pairs(file, (LabelledPair("a", image, image, 1.0, f"{i}-0", f"{i}-1", "base", "base") for i in range(4)))


@pytest.mark.recipe
@pytest.mark.parametrize(
    "page", [page for page in CHECKED if any(block.language == "python" for block in blocks(page))]
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    save_modules(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(page):
        if block.language == "python":
            text = block.text.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", "demo")
            exec(text.replace("TextToImage(pipeline)", "TextToImage(pipeline, steps=2)").replace("50", "2"), names)
    assert names["images"].shape == (1, 64, 64, 3)
    if "merged" in names:
        assert load_pipeline("merged").unet.config == names["pipeline"].unet.config


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_links_to_exist(page):
    for _, target in links(page):
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_a_name_that_a_page_links_to_is_defined_in_that_file(page):
    for text, target in links(page):
        if re.fullmatch(r"`\w+`", text) and target.endswith(".py"):
            source = ((ROOT / page).parent / target).read_text()
            assert re.search(rf"^(def|class) {text[1:-1]}\b|^{text[1:-1]}\b.* = ", source, re.MULTILINE), (
                f"{page}: {text}"
            )


@pytest.mark.parametrize("name", ["cpgd", "DiffusionDPO", "COMPONENTS", "bank_predict", "image_keys", "partition"])
def test_the_readme_is_two_clicks_at_most_from_what_newcomers_look_for(name):
    pages = {"README.md", *(target for _, target in links("README.md") if target.endswith(".md"))}
    assert any(text == f"`{name}`" for page in pages for text, _ in links(page))


def test_the_readme_fits_on_a_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90


def anchors(page):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
