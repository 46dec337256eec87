"""Runs that are tracked: stand-ins with the calls of W&B and trackio record what the packages would get."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from test_trainer import Pull
from tiny import tiny_run, tiny_world

from flax_pref.config import UserError
from flax_pref.data.pipeline import InputConfig
from flax_pref.training import trainer
from flax_pref.training.records import METRICS, Recorder, last_recorded
from flax_pref.training.samples import SampleConfig
from flax_pref.training.trackers import TRACKERS, RunTracker
from flax_pref.training.trainer import CheckpointConfig, train


class StandInRun:
    """What `init` of both packages returns."""

    def __init__(self, begun):
        self.begun, self.logged, self.ended = begun, [], None

    def log(self, data, step):
        assert not self.logged or step >= self.logged[-1][0], "W&B drops steps that decrease"
        self.logged.append((step, data))

    def finish(self, exit_code=None):
        self.ended = "finished" if exit_code is None else exit_code


@pytest.fixture(params=sorted(TRACKERS))
def package(request, monkeypatch):
    """A package of a tracker; `runs` are those that were begun in it."""
    module = ModuleType(request.param)
    module.runs = []

    def begin(**options):
        module.runs.append(StandInRun(options))
        return module.runs[-1]

    def begin_wandb(*, project, name, id, resume, dir, config):
        return begin(project=project, name=id, shown=name, resume=resume, config=config, folder=dir)

    def begin_trackio(project, name=None, *, resume="never", config=None, embed=True):
        return begin(project=project, name=name, resume=resume, config=config)

    module.init = {"wandb": begin_wandb, "trackio": begin_trackio}[request.param]
    module.Image = lambda path: ("image", Path(path).read_bytes()[:4])
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def config(world, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "peak_of", lambda device, dtype: (None, "not measured"))
    monkeypatch.setattr(trainer.Run, "samples", lambda self: Drawn())
    return tiny_run(
        tmp_path / "run",
        world,
        method=Pull(),
        input=InputConfig(batch_size=4),
        samples=SampleConfig(every=2, prompts=("a cat",)),
        checkpoints=CheckpointConfig(every=2),
        steps=6,
    )


class Drawn:
    """Draws nothing of the networks: a black image."""

    def draw(self, bank):
        return np.zeros((1, 8, 8, 3), np.float32)


def told(run):
    """Steps of metrics and of pictures that a run of a tracker got."""
    return (
        [step for step, data in run.logged if "loss" in data],
        [step for step, data in run.logged if "samples" in data],
    )


@pytest.mark.parametrize("package", ["wandb"], indirect=True)
def test_a_run_that_was_killed_continues_its_tracker_where_that_stood(package, config, monkeypatch):
    config = dataclasses.replace(config, track=package.__name__, track_project="pref")
    add = Recorder.add

    def killed(self, step, *arguments):
        newest = add(self, step, *arguments)
        if step == 5:
            self.flush()
            raise KeyboardInterrupt
        return newest

    monkeypatch.setattr(Recorder, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(Recorder, "add", add)
    train(config)
    first, second = package.runs
    assert first.begun["name"] == second.begun["name"] and first.begun["project"] == "pref"
    assert {first.begun["resume"], second.begun["resume"]} == {"allow"}
    assert told(first) == ([1, 2, 3, 4, 5], [2, 4]) and told(second) == ([6], [6])
    assert (first.ended, second.ended) == (1, 0)
    lines = [json.loads(line) for line in (config.output / METRICS).read_text().splitlines()]
    tracked = {step: data["loss"] for run in package.runs for step, data in run.logged if "loss" in data}
    assert tracked == {line["step"]: line["loss"] for line in lines}
    picture = next(data["samples"] for _, data in first.logged if "samples" in data)
    assert picture == ("image", b"\x89PNG")
    assert first.begun["config"]["method"]["name"] == "Pull" and first.begun["config"]["steps"] == 6
    assert json.loads(json.dumps(first.begun["config"])) == first.begun["config"]
    assert first.begun["config"]["output"] == "run", "without the folders of this machine"


def test_another_project_or_a_tracker_that_joins_late_gets_all_steps_from_there(package, tmp_path):
    (tmp_path / METRICS).write_text('{"step": 7}\n{"step": 8}\n{"st')
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "000006.png").write_bytes(b"")
    assert last_recorded(tmp_path) == (8, 6) and last_recorded(tmp_path / "nowhere") == (0, 0)
    for project in ("a", "a", "b"):
        with RunTracker(package.__name__, project, tmp_path, {}, last_recorded(tmp_path)) as tracker:
            for step in (5, 9):
                tracker.log({"loss": 1.0, "none": None}, step)
    assert [[step for step, _ in run.logged] for run in package.runs] == [[5, 9], [9], [5, 9]]
    names = [run.begun["name"] for run in package.runs]
    assert all(run.ended == (0 if package.__name__ == "wandb" else "finished") for run in package.runs)
    assert names[0] == names[1] != names[2] and package.runs[0].logged[0][1] == {"loss": 1.0}


def test_only_the_first_of_several_hosts_tracks(package, config, monkeypatch):
    run = SimpleNamespace(config=dataclasses.replace(config, track=package.__name__))
    run.config.output.mkdir()
    for process, count in ((1, 0), (0, 1)):
        monkeypatch.setattr(trainer.jax, "process_index", lambda process=process: process)
        with trainer.Run.tracked(run) as tracker:
            assert (tracker is not None) == (process == 0) and len(package.runs) == count


def test_a_tracker_that_fails_does_not_end_the_run(package, tmp_path, capsys):
    def fail(*arguments, **options):
        raise ConnectionError("no\nroute")

    failing = RunTracker(package.__name__, "a", tmp_path, {}, (0, 0))
    package.runs[0].log = fail
    with failing as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.log({"loss": 1.0}, 2)
    assert capsys.readouterr().err.strip() == (
        f"{package.__name__}: tracks no longer (no route); the run continues, its files have all"
    )
    package.init = fail
    with pytest.raises(UserError, match=r"cannot begin a run \(no route\); log in, set its offline mode"):
        RunTracker(package.__name__, "a", tmp_path, {}, (0, 0))


def test_without_the_package_one_line_names_the_extra_before_anything_is_loaded(package, config, monkeypatch):
    name = package.__name__
    monkeypatch.setattr(trainer, "Run", None)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"--track {name}: .*pip install 'flax-pref\[{name}\]'"):
        train(dataclasses.replace(config, track=name))
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(UserError, match=f"{name} is no package but a folder"):
        train(dataclasses.replace(config, track=name))


def test_a_run_that_is_not_tracked_imports_no_tracker(config, monkeypatch):
    for name in TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)
    train(dataclasses.replace(config, steps=2))
    assert not (config.output / "tracker.json").exists() and last_recorded(config.output) == (2, 2)
