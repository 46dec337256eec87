"""`flax-pref`: one command for all programs, from a clone and from a wheel."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from flax_pref import config, programs
from flax_pref.cli import command
from flax_pref.config import CONFIGS, load_config
from flax_pref.programs import PROGRAMS

ROOT = Path(__file__).parents[2]
# What makes a start slow: each takes a good part of a second, or seconds.
SLOW = {"jax", "flax", "orbax", "optax", "grain", "tensorflow_datasets", "pyarrow", "numpy", "PIL"}
SLOW |= {"etils", "huggingface_hub"}


def helps(*programs):
    """What `flax-pref PROGRAM --help` prints, one after another, and the modules that this has imported."""
    program = """
import contextlib, io, json, sys
from flax_pref.cli.command import main
printed = []
for name in sys.argv[1:]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as output:
        main([*name.split(), "--help"])
    printed.append(output.getvalue())
json.dump([printed, sorted(sys.modules)], sys.stdout)
"""
    done = subprocess.run([sys.executable, "-c", program, *programs], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    printed, modules = json.loads(done.stdout)
    return printed, set(modules)


def test_help_lists_the_programs_and_imports_no_library():
    (printed,), modules = helps("")
    assert {line.split()[0] for line in printed.splitlines() if line.startswith("  ")} == set(PROGRAMS)
    assert not modules & (SLOW | {"tyro"})


def test_the_help_of_no_program_imports_anything_slow():
    printed, modules = helps(*PROGRAMS)
    for name, text in zip(PROGRAMS, printed, strict=True):
        assert f"usage: flax-pref {name} " in text
    assert not modules & SLOW


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_command_and_the_module_are_the_same_program(name):
    module = importlib.import_module(PROGRAMS[name].module)
    assert module.main is importlib.import_module(f"flax_pref.cli.{name.replace('-', '_')}").main


@pytest.mark.parametrize("file", sorted([*ROOT.glob("train/*.py"), *ROOT.glob("sample/*.py")]), ids=lambda f: f.stem)
def test_the_files_of_programs_hold_no_code_that_a_wheel_would_lack(file):
    body = ast.parse(file.read_text()).body
    assert not [node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def run(capsys, *arguments):
    """Status, stdout and stderr of `flax-pref ...`."""
    try:
        status = command.main(arguments)
    except SystemExit as exit:
        status = exit.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("trian",), 2, "no program 'trian'; perhaps you meant train; see flax-pref --help"),
        (("x",), 2, "no program 'x'; expected one of sample, score,"),
        (("train",), 2, "usage: flax-pref train CONFIG [--FIELD VALUE ...]; flax-pref train --help lists the configs"),
        (("train", "sd15/dop"), 2, "sd15/dop: no such config file, and no config of this name; perhaps you meant"),
        (("encode", "mine"), 2, "shipped configs: demo/encode, sd15/encode_image_reward_db, sd15/encode_pick_a_pic, "),
        (("train", "demo/encode"), 2, "demo/encode: config is a EncodeConfig, but flax-pref train needs a TrainConfig"),
        (("train", "demo/dpo", "--stepz", "3"), 2, "see flax-pref train demo/dpo --help"),
        (("sample", "--model", "demo", "--step", "3"), 2, "see flax-pref sample --help"),
        (("sample", "--model", "demo"), 1, "expected either --prompt with texts or --prompts with a file"),
        (("report", "nowhere"), 1, "nowhere: no such folder; run flax-pref score nowhere --rewards"),
        (("score", "nowhere", "--rewards", "judge"), 1, "expected a finished one of flax-pref sample, or one with"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_that_names_the_command(arguments, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got, out, err = run(capsys, *arguments)
    assert got == status and out == "" and err.count("\n") == 1
    assert message in err and "python -m" not in err
    assert programs.command("score") == "python -m sample.score", "outside of flax-pref nothing has changed"


def test_shipped_configs_are_found_by_name_from_any_folder(tmp_path, monkeypatch, capsys):
    from flax_pref.demo.experiment import DemoConfig
    from flax_pref.training.trainer import TrainConfig

    by_path = load_config([str(CONFIGS / "sd15/dpo.py"), "--steps", "7"], TrainConfig)
    monkeypatch.chdir(tmp_path)
    assert load_config(["sd15/dpo", "--steps", "7"], TrainConfig) == by_path
    assert load_config(["configs/sd15/dpo.py", "--steps", "7"], TrainConfig) == by_path
    assert load_config(["--quick"], DemoConfig, default="demo/demo").quick
    (tmp_path / "sd15").mkdir()
    (tmp_path / "sd15/dpo.py").write_text("config = 3")
    assert load_config(["sd15/dpo", "--steps", "7"], TrainConfig) == by_path, "a name is no path without .py"
    with pytest.raises(SystemExit):
        load_config(["sd15/dpo.py"], TrainConfig)
    assert "sd15/dpo.py: config is a int" in capsys.readouterr().err


def test_the_configs_that_help_lists_are_those_of_the_kind():
    """Help reads docstrings instead of executing the configs."""
    for name in ("train", "encode", "demo", "base"):
        kind = PROGRAMS[name].config
        assert config._shipped((kind,)) == config._shipped((config._resolved(kind),))


def test_the_prompts_of_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    from flax_pref.data.prompts import read_prompts

    monkeypatch.chdir(tmp_path)
    assert len(read_prompts("configs/animals.txt")) == 45
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/animals.txt").write_text("a newt\n")
    assert [prompt.text for prompt in read_prompts("configs/animals.txt")] == ["a newt"]


def test_help_texts_are_phrases_that_stand_alone():
    from flax_pref.app.app_flags import AppFlags
    from flax_pref.evaluation.report_flags import ReportFlags
    from flax_pref.evaluation.score_flags import ScoreFlags
    from flax_pref.images.image_flags import ImageFlags
    from flax_pref.planning.plan_flags import SamplingPlanFlags
    from flax_pref.serving.export_flags import ExportFlags
    from flax_pref.sharing.push_flags import PushFlags

    for flags in (AppFlags, ImageFlags, ScoreFlags, ReportFlags, ExportFlags, PushFlags, SamplingPlanFlags):
        texts = {}
        for kind in flags.__mro__[:-1]:
            body = ast.parse(Path(sys.modules[kind.__module__].__file__).read_text()).body
            body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == kind.__name__).body
            fields = [node for node in body if isinstance(node, ast.AnnAssign)]
            for field in fields:
                after = body[body.index(field) + 1] if body.index(field) + 1 < len(body) else None
                text = after.value.value if isinstance(after, ast.Expr) else ""
                texts[field.target.id] = text
        for name, text in texts.items():
            assert text, f"{flags.__name__}.{name} has no help"
            assert not re.match(r"(Of|None:|The same|To be|What)\b", text), text


def test_a_wheel_has_the_command_and_the_configs(tmp_path):
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["project"]["scripts"] == {"flax-pref": "flax_pref.cli.command:main"}
    hatchling = pytest.importorskip("hatchling.builders.wheel")
    builder = hatchling.WheelBuilder(str(ROOT))
    (wheel,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {f"flax_pref/configs/{file.relative_to(CONFIGS).as_posix()}" for file in CONFIGS.rglob("*.*")}
    assert {name for name in shipped if "__pycache__" not in name} <= names
    assert not [name for name in names if name.startswith(("train/", "sample/", "configs/", "tests/"))]
