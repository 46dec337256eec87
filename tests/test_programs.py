"""The programs as users run them, in processes of their own."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from flax_pref.config import UserError
from flax_pref.files import one_writer

ROOT = Path(__file__).parents[1]

# Runs a program as `python -m` does, then tells which of the forbidden libraries came along. All are installed in the
# environment of the tests, so an import of theirs would succeed.
NO_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as exit:
    assert not exit.code, exit.code
loaded = {"torch", "tensorflow", "diffusers", "transformers", "peft"} & set(sys.modules)
assert not loaded, f"the runtime imported {loaded}"
"""


def run(*arguments, timeout=900):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def quick_demo(folder):
    done = run("-c", NO_TORCH, "train.demo", "configs/demo/demo.py", "--quick", "--output", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def strip_time(report):
    return {key: value for key, value in report.items() if key != "seconds"}


@pytest.mark.parametrize("name", ["base", "demo"])
def test_a_second_program_does_not_write_into_the_same_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    program = importlib.import_module(f"train.{name}")
    with one_writer(tmp_path), pytest.raises(UserError, match="another program writes into this folder"):
        program.main([f"configs/demo/{name}.py", "--output", str(tmp_path)])
    assert not list(tmp_path.glob("[!.]*"))


@pytest.mark.long
def test_the_demo_runs_without_torch_and_twice_the_same(tmp_path):
    reports = []
    for name in ("first", "second"):
        done = quick_demo(tmp_path / name)
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    assert strip_time(reports[0]) == strip_time(reports[1])
    assert reports[0]["prompts"] >= 16
    assert set(reports[0]["methods"]) == {"base", "cfg", "dpo", "pgd", "cpgd"}
    assert "held-out prompts" in done.stdout
    assert "step/s" in done.stderr and "image/s" in done.stderr, "progress with rates"
    expected = {".lock", "config.json", "pairs.parquet", "dpo.safetensors", "pos.safetensors", "neg.safetensors"}
    expected |= {"report.json", "report.html", "grid.png", "sweep.png", "training"}
    assert {path.name for path in (tmp_path / "first").iterdir()} == expected
    for module, rule in (("dpo", "pgd"), ("pos", "cpgd"), ("neg", "cpgd")):
        with safe_open(tmp_path / "first" / f"{module}.safetensors", framework="numpy") as file:
            assert float(file.metadata()["flax_pref.w"]) == reports[0]["methods"][rule]["w"]


DEMO = ("-m", "train.demo", "configs/demo/demo.py")
MISTAKES = {
    "unknown field": ((*DEMO, "--dpo.step", "3"), "perhaps you meant --dpo.steps"),
    "missing config": (("-m", "train.demo", "configs/demo/dem.py"), "configs/demo/dem.py: no such config file"),
    "output is a file": ((*DEMO, "--output", "README.md/run"), "README.md/run: cannot write into this folder"),
    "w is not finite": (
        (*DEMO, "--w-cpgd", "1.0", "inf"),
        "w_cpgd=(1.0, inf); expected at least one number, all of them finite",
    ),
    "base is no checkpoint": ((*DEMO, "--base", "docs", "--output", "{tmp}"), "model_index.json: no such file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_a_failure(mistake, tmp_path):
    arguments, message = MISTAKES[mistake]
    done = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
