"""What a project says of itself in several files: licence, versions, and the checks of its CI."""

import re
import tomllib
from pathlib import Path

import yaml

import flax_pref

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def read_yaml(path):
    return yaml.safe_load((ROOT / path).read_text())


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def test_users_get_the_licence_that_the_metadata_names():
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "Copyright 2026 The flax_pref authors" in text and "[yyyy]" not in text
    assert "weights" in (ROOT / "README.md").read_text().partition("## License")[2]


def test_a_citation_names_the_version_and_licence_of_the_package():
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == flax_pref.__version__
    assert citation["license"] == PROJECT["license"]


def test_a_commit_is_checked_by_the_ruff_of_make_lint():
    hooks = {repo["repo"]: repo for repo in read_yaml(".pre-commit-config.yaml")["repos"]}
    (ruff,) = (line for line in PROJECT["optional-dependencies"]["test"] if line.startswith("ruff"))
    assert hooks["https://github.com/astral-sh/ruff-pre-commit"]["rev"] == "v" + ruff.partition("==")[2]
    assert [hook["entry"] for hook in hooks["local"]["hooks"]] == ["make lint"]


def test_every_python_that_the_package_claims_is_tested():
    classifiers = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", text) for text in PROJECT["classifiers"]]
    claimed = [match[1] for match in classifiers if match]
    assert PROJECT["requires-python"] == f">={claimed[0]}"
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == claimed
    assert {name: commands(job) for name, job in jobs.items()} == {
        "lint": ["make lint"],
        "test": ["make test"],
        "bench": ["make bench"],
        "docs": ["make docs"],
    }


def test_pip_installs_no_torch_where_the_tests_skip_what_needs_it():
    for line in PROJECT["optional-dependencies"]["test"]:
        if re.match("torch|diffusers|peft|accelerate", line):
            assert line.endswith("; python_version < '3.12'"), line
