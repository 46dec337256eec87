"""The programs by name: how users call them, and how messages name them."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_called: str | None = None  # the command of the program that runs, where `flax-pref` started it
_CLONE = (Path(__file__).parents[1] / "train").is_dir()  # a wheel has the library only


class Command(NamedTuple):
    """A program.

    Attributes:
        module: what `python -m` takes in a clone of the repository.
        about: what it does, in a sentence.
        config: dataclass of its config file, `MODULE:CLASS`; "": it takes flags only.
    """

    module: str
    about: str
    config: str = ""


PROGRAMS = {
    "sample": Command("sample.images", "Draws images from a Stable Diffusion checkpoint."),
    "score": Command("sample.score", "Scores folders of images, or the pairs of prepared sets, with rewards."),
    "report": Command("sample.report", "Compares methods on the same prompts and seeds."),
    "controls": Command(
        "sample.controls", "Draws controls of the base model that spend as much, and compares methods with them."
    ),
    "leaderboard": Command("sample.leaderboard", "Merges reports: a row for each method, a column for each reward."),
    "encode": Command(
        "train.encode", "Encodes a preference set for training.", "flax_pref.data.preparation:EncodeConfig"
    ),
    "train": Command("train.modules", "Trains preference modules.", "flax_pref.training.trainer:TrainConfig"),
    "export": Command(
        "sample.export", "Exports a sampler: a program that is served without tracing, or a pipeline of diffusers."
    ),
    "push": Command("sample.push", "Shares a training run, an image set or a report on the Hub, with a card."),
    "app": Command(
        "sample.app", "Serves a page to play with: base and guided image side by side, from the same noise."
    ),
    "plan": Command("train.plan", "Plans training or encoding for a TPU slice that is not there."),
    "plan-sample": Command("sample.plan", "Plans sampling for a TPU slice that is not there."),
    "verify": Command("sample.verify", "Checks that this machine computes what it should, and how fast."),
    "demo": Command(
        "train.demo",
        "Runs the whole path on the demo world: draws pairs, labels them, trains modules, compares methods.",
        "flax_pref.demo.experiment:DemoConfig",
    ),
    "study": Command(
        "train.study",
        "Measures on the demo world when contrastive guidance pays, cell by cell.",
        "flax_pref.demo.study:StudyConfig",
    ),
    "base": Command("train.base", "Trains the base model of the demo world.", "flax_pref.demo.pretraining:BaseConfig"),
}


def program_name() -> str:
    """The program that runs: `flax-pref train`, or as `python -m` takes it, `train.modules`."""
    if _called is not None:
        return _called
    spec = sys.modules["__main__"].__spec__ if "__main__" in sys.modules else None
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem


def own_command() -> str:
    """The command of the program that runs, for its usage: `flax-pref train` or `python -m train.modules`."""
    return _called or f"python -m {program_name()}"


def by_name() -> bool:
    """Whether the programs are called as `flax-pref NAME`: that is how this one was, or there is no clone."""
    return _called is not None or not _CLONE


def command(name: str) -> str:
    """The command of a program of the table, for messages: `flax-pref score` or `python -m sample.score`."""
    return f"flax-pref {name}" if by_name() else f"python -m {PROGRAMS[name].module}"


def title(name: str) -> str:
    """The name of a program of the table, for messages about what it made: `flax-pref score` or `sample.score`."""
    return f"flax-pref {name}" if by_name() else PROGRAMS[name].module


@contextlib.contextmanager
def called(name: str) -> Iterator[None]:
    """Within the block, messages name the programs as `flax-pref NAME`."""
    global _called
    before, _called = _called, f"flax-pref {name}"
    try:
        yield
    finally:
        _called = before
