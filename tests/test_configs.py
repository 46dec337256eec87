"""The shipped configs: each builds, and begins with the command that runs it."""

import importlib
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.py"))


@pytest.mark.parametrize("file", CONFIGS)
def test_a_config_is_of_the_kind_that_the_program_in_its_docstring_reads(file):
    names = runpy.run_path(str(ROOT / file))
    command = re.search(rf"python -m (train\.\w+) {re.escape(file)}", names["__doc__"])
    assert command, f"{file}: its docstring does not say the command that runs it"
    program = importlib.import_module(command[1])
    assert any(type(names["config"]) is value for value in vars(program).values())
