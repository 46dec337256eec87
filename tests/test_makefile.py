"""Which Python and which environment `make` uses."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments, path=()):
    """Runs `make --dry-run`, which prints the commands; those of test-python that ask for a Python do run."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "PYTHON", "PYENV"))}
    environment["PATH"] = os.pathsep.join([*map(str, path), environment["PATH"]])
    done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        ([], ".venv"),
        (["PYTHON=/usr/bin/python3"], ".venv"),
        (["PYTHON=python"], ".venv"),
        (["PYTHON=python3.12"], ".venv-3.12"),
        (["PYTHON=/opt/bin/python3.13"], ".venv-3.13"),
        (["PYTHON=python3.12", "VENV=.venv"], ".venv"),
    ],
)
def test_each_python_that_is_named_has_an_environment_of_its_own(arguments, environment):
    assert f"\n{environment}/bin/python -m pytest" in "\n" + make("test", *arguments)
    assert f"\n{environment}/bin/python -m train.demo" in "\n" + make("demo", *arguments)


def test_a_python_that_pyenv_has_but_did_not_select_is_used(tmp_path):
    write_program(tmp_path / "python3.12", '[ "$PYENV_VERSION" = 3.12.9 ] || exit 127')
    write_program(tmp_path / "pyenv", '[ "$*" = "whence python3.12" ] && echo 3.12.1 && echo 3.12.9')
    commands = make("test", "PYTHON=python3.12", f"VENV={tmp_path}/venv", path=[tmp_path])
    assert f"PYENV_VERSION=3.12.9 python3.12 -m venv {tmp_path}/venv" in commands
    assert "pytest" in make("test-python", "PYTHON=python3.12", f"VENV={tmp_path}/venv", path=[tmp_path])


def test_a_python_that_is_missing_is_said_to_be_skipped():
    said = make("test-python", "PYTHON=python3.99").splitlines()[-1]
    assert said == "skipped: there is no python3.99 on this machine"


def test_the_tests_of_another_python_are_there():
    """A folder of tests that is renamed is renamed in the Makefile too."""
    arguments = make("test-python").partition(" -m pytest ")[2].splitlines()[0].split()
    folders = [argument for argument in arguments if argument.startswith("tests/")]
    assert folders and all((ROOT / folder).is_dir() for folder in folders)
