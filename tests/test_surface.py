"""What `import flax_pref` offers: names, their examples, and what editors see of them."""

import ast
import collections
import doctest
import functools
import json
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints.small import small_pipeline
from PIL import Image
from training.tiny import tiny_checkpoint, tiny_set

import flax_pref as fp
from flax_pref.checkpoints import diffusers
from flax_pref.checkpoints.lora import lora_network
from flax_pref.models.lora import select_lora, split_lora
from flax_pref.serving.export import export_sampler

ROOT = Path(__file__).parents[1]
NAMES = [name for name in fp.__all__ if name != "__version__"]
PROMPTS = ["a large red circle in the middle, white background", "a small blue cross at the top, grey background"]


# ----------------------------------------------------------------------------------------------------------------------
# Names


def test_importing_the_package_takes_no_time():
    """Nothing but the standard library is imported until a name is used."""
    code = (
        "import sys, time; before = set(sys.modules); start = time.process_time(); import flax_pref; dir(flax_pref)\n"
        "seconds = time.process_time() - start; print(seconds, *(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *imported = done.stdout.split()
    assert {name.partition(".")[0] for name in imported} - sys.stdlib_module_names == {"flax_pref"}
    assert float(seconds) < 0.1


def test_every_name_is_listed_and_there():
    assert set(fp.__all__) <= set(dir(fp))
    for name in NAMES:
        value = getattr(fp, name)
        assert value.__name__ == name


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'flax_pref' has no attribute 'StableDiffusion'"):
        fp.StableDiffusion  # noqa: B018
    assert not hasattr(fp, "__wrapped__")  # what inspect and doctest ask for


def test_no_two_public_classes_have_one_name():
    defined = collections.Counter(
        node.name
        for file in (ROOT / "flax_pref").rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in defined.items() if count > 1] == []


def test_star_imports_every_name():
    names = {}
    exec("from flax_pref import *", names)
    assert names["TextToImage"] is fp.TextToImage and set(NAMES) <= set(names)


def test_editors_see_the_names_that_are_there():
    tree = ast.parse(Path(fp.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == {name: (module, name) for name, module in fp._MODULE_OF.items()}


def test_the_package_has_a_version_and_says_that_it_is_typed():
    assert re.fullmatch(r"\d+\.\d+\.\d+", fp.__version__)
    assert (resources.files("flax_pref") / "py.typed").is_file()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("tutorials/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_needs_one_import(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        nodes = list(ast.walk(ast.parse(block)))
        imports = {ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)}
        assert imports <= {"import flax_pref as fp"}
        used = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
        assert {name for name in used if re.fullmatch(r"fp\.\w+", name)} <= {f"fp.{name}" for name in fp.__all__}


# ----------------------------------------------------------------------------------------------------------------------
# Examples


@functools.cache
def load_pipeline(name):
    return diffusers.load_pipeline(name)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What examples read: modules, pairs, a checkpoint with a prepared set, and images of two methods."""
    folder = tmp_path_factory.mktemp("files")
    pipeline = load_pipeline("demo")
    unet = lora_network(pipeline.unet, ("pos", "neg", "dpo"), rank=2, alpha=2, key=jax.random.key(0))
    _, lora = split_lora(unet.params)
    for i, name in enumerate(("pos", "neg", "dpo")):
        fp.save_lora(select_lora(lora, i), folder / f"{name}.safetensors", alpha=2)
    rng = np.random.default_rng(0)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    rows = []
    for method in ("base", "cpgd"):
        (folder / "runs" / method).mkdir(parents=True)
        for i, prompt in enumerate(PROMPTS):
            image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
            image.save(folder / "runs" / method / f"{i}.png")
            (folder / "runs" / method / f"{i}.txt").write_text(prompt)
    tiny_checkpoint(folder / "sd15", "sd15")
    tiny_set(folder / "runs" / "prepared", "sd15")
    (folder / "pairs").mkdir()
    for i in range(4):
        for role in ("winner", "loser"):
            image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
            image.save(folder / "pairs" / f"{role}{i}.png")
        rows.append({"prompt": PROMPTS[i % 2], "winner": f"winner{i}.png", "loser": f"loser{i}.png"})
    (folder / "pairs" / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


class IgnoresProgress(doctest.OutputChecker):
    """What programs print while they work is no part of an example that shows no output."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_docstring_runs(name, files, tmp_path, monkeypatch):
    value = getattr(fp, name)
    example = doctest.DocTestParser().get_doctest(value.__doc__, {"fp": fp}, name, value.__module__, 0)
    assert example.examples and re.search(r"^ *Example:$", value.__doc__, re.MULTILINE)
    folder = tmp_path / "files"
    shutil.copytree(files, folder)
    monkeypatch.chdir(folder)
    if name == "save_single_file":
        diffusers.save_pipeline(small_pipeline("sd1"), "v1-5")
    if name == "load_sampler":
        draw = fp.TextToImage(fp.load_pipeline("sd15"), steps=1)
        export_sampler(draw, {"name": "cfg", "guidance_scale": 7.5}, "runs/exported", platforms=["cpu"], about={})
    monkeypatch.setattr(fp, "load_pipeline", lambda name: load_pipeline(name))
    told = []
    runner = doctest.DocTestRunner(IgnoresProgress(), optionflags=doctest.REPORT_NDIFF)
    assert runner.run(example, out=told.append).failed == 0, "".join(told)
