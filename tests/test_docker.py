"""The Dockerfiles: their instructions are understood, and their steps make the command in a fresh environment.

No image is built here. The steps run without one, in a folder: the files are copied, then the RUN steps follow.
"""

import fnmatch
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "integrations" / "docker").glob("*Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
KNOWN = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "VOLUME", "USER", "ENTRYPOINT", "CMD"}


class Instruction(NamedTuple):
    """A line of a Dockerfile: its instruction and what follows it."""

    name: str
    value: str


def stages_of(text):
    """The instructions of each stage; the stage's FROM is its first."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [Instruction(*line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.name == "FROM"]
    return [lines[start:end] for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]


def ignored(path):
    """Whether .dockerignore leaves a path out: the last line that matches it, or a folder above it, decides."""
    result = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        above = [path, *path.parents][:-1]
        names = [folder.name for folder in above] if "**/" in line else [str(folder) for folder in above]
        if line and not line.startswith("#") and any(fnmatch.fnmatch(name, pattern) for name in names):
            result = not line.startswith("!")
    return result


def problems(text):
    """Everything that is wrong with a Dockerfile."""
    stages = stages_of(text)
    names, copied = [], set()
    for stage in stages:
        yield from (f"{line.name} is no instruction" for line in stage if line.name not in KNOWN)
        base, *named = re.split(r"\s+AS\s+", stage[0].value)
        if not re.search(r":[\w.-]+$", base) or base.endswith(":latest"):
            yield f"FROM {base}: names no version"
        for line in stage:
            if line.name == "COPY" and (source := re.match(r"--from=(\S+)", line.value)):
                if source[1] not in names:
                    yield f"COPY --from={source[1]}: there is no such stage before it"
            elif line.name == "COPY":
                sources = line.value.split()[:-1]
                copied |= set(sources)
                yield from (f"COPY: no {source}" for source in sources if not (ROOT / source).exists())
                yield from (f"COPY: .dockerignore leaves out {name}" for name in sources if ignored(Path(name)))
            elif line.name == "RUN":
                checked = subprocess.run(["sh", "-n"], input=line.value, capture_output=True, text=True)
                yield from filter(None, [checked.stderr])
            elif line.name == "ARG" and line.value.startswith("EXTRA="):
                extra = line.value.partition("=")[2]
                if extra not in PROJECT["project"]["optional-dependencies"]:
                    yield f"ARG {line.value}: pyproject.toml has no such extra"
        names += named
    # What the wheel is built from.
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    yield from (
        f"COPY lacks {name}" for name in sorted((needed | {*wheel["packages"], *wheel["force-include"]}) - copied)
    )
    if len(stages) < 2:
        yield "one stage: the image has what only building needs"
    last = {line.name: line.value for line in stages[-1]}
    if last.get("USER", "root").partition(":")[0] in ("root", "0"):
        yield "the program runs as root"
    elif not any(line.name == "RUN" and re.search(rf"useradd .*\b{last['USER']}\b", line.value) for line in stages[-1]):
        yield f"USER {last['USER']}: nothing makes this user"
    if last.get("ENTRYPOINT") != json.dumps(["flax-pref"]):
        yield "ENTRYPOINT is not flax-pref"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_dockerfile_is_understood(file):
    assert list(problems(file.read_text())) == []
    build = re.search(r"docker build --file (\S+)", file.read_text())
    assert build and ROOT / build[1] == file


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ("COPY configs configs\n", "", "COPY lacks configs"),
        ("COPY configs configs", "COPY config config", "COPY: no config"),
        ("COPY configs configs", "COPY tests tests", "leaves out tests"),
        ("--from=build", "--from=builder", "no such stage"),
        ("ARG EXTRA=tpu", "ARG EXTRA=tpus", "no such extra"),
        ("python:3.12-slim AS", "python AS", "names no version"),
        ("USER flax\n", "", "runs as root"),
        ("USER flax", "USER flux", "nothing makes this user"),
        ('["flax-pref"]', '["python"]', "ENTRYPOINT"),
        ("WORKDIR /src", "CHDIR /src", "CHDIR is no instruction"),
        ("&& install", "&&& install", "yntax error"),
    ],
)
def test_a_mistake_in_a_dockerfile_would_be_found(right, wrong, expected):
    text = (ROOT / "integrations" / "docker" / "tpu.Dockerfile").read_text()
    assert right in text
    found = list(problems(text.replace(right, wrong)))
    assert any(expected in problem for problem in found), found


def test_the_images_differ_in_what_the_device_needs_only():
    tpu, cuda = ((ROOT / "integrations" / "docker" / f"{name}.Dockerfile").read_text() for name in ("tpu", "cuda"))
    build, image = stages_of(tpu)
    assert build == stages_of(cuda)[0]
    differing = {line.name for line in {*image} ^ {*stages_of(cuda)[1]}}
    assert differing == {"ARG", "RUN", "ENV"}  # the extra, gcsfs, NVIDIA's variables


def environment(folder):
    """A new virtual environment beside whose packages lie links to those of this one, all but flax_pref's."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    (folder / "packages").mkdir()
    for package in (path for place in site.getsitepackages() for path in Path(place).iterdir()):
        if not re.match(r"(flax_pref|_?editable_|_editable|pip|setuptools)", package.name):
            (folder / "packages" / package.name).symlink_to(package)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(f"{folder / 'packages'}\n")
    return folder / "venv" / "bin"


@pytest.mark.program
def test_the_steps_of_the_image_make_the_command(tmp_path):
    """With an extra that needs no device; all else is what `docker build` runs, but for the user, whom root makes."""
    file = ROOT / "integrations" / "docker" / "tpu.Dockerfile"
    binaries = environment(tmp_path)
    variables = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "EXTRA": "quantize",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    variables.pop("PYTHONPATH", None)
    place = tmp_path / "image"

    def inside(text):
        return re.sub(r"(?<![\w.])/(?=(src|wheels|cache|work)\b)", f"{place}/", text)

    for stage in stages_of(file.read_text()):
        folder = place
        for line in stage:
            if line.name == "WORKDIR":
                folder = Path(inside(line.value))
                folder.mkdir(parents=True, exist_ok=True)
            elif line.name == "COPY" and not line.value.startswith("--from"):
                *sources, _ = line.value.split()
                for source in (ROOT / name for name in sources):
                    left_out = shutil.ignore_patterns("__pycache__")
                    if source.is_dir():
                        shutil.copytree(source, folder / source.name, ignore=left_out)
                    else:
                        shutil.copy(source, folder)
            elif line.name == "ENV":
                variables |= dict(part.split("=", 1) for part in inside(line.value).split())
            elif line.name == "RUN" and "useradd" not in line.value:  # for root
                done = subprocess.run(
                    inside(line.value), shell=True, cwd=folder, env=variables, capture_output=True, text=True
                )
                assert done.returncode == 0, done.stderr[-2000:]
    for arguments in (["--help"], ["sample", "--model", "demo", "--prompt", "a", "--steps", "2", "--out", "images"]):
        done = subprocess.run(
            [binaries / "flax-pref", *arguments], cwd=place / "work", env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert list((place / "work" / "images").glob("*.png"))
    where = [binaries / "python", "-c", "import flax_pref; print(flax_pref.__file__)"]
    printed = subprocess.run(where, cwd=place / "work", env=variables, capture_output=True, text=True).stdout
    assert Path(printed).is_relative_to(tmp_path / "venv")
