"""Experiment trackers, which get the metrics and pictures of a run too: W&B and trackio, behind one protocol.

To add one, write a class with the methods of `Tracker` and its line in `TRACKERS`.
"""

import contextlib
import importlib
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol

from tqdm import tqdm

from flax_pref.config import UserError
from flax_pref.files import read_json, replacing, write_json, writing

TrackerName = Literal["wandb", "trackio"]
TRACKED = "tracker.json"  # in the folder of a run: which run of a tracker it is


class TrackedRun(NamedTuple):
    """A run, as a tracker is told of it before the first step.

    Attributes:
        folder: of the run.
        project: of the tracker.
        id: of the tracker's run; a run that resumes has the same again.
        settings: of the run, values that JSON can hold.
    """

    folder: Path
    project: str
    id: str
    settings: Mapping[str, Any]


class Tracker(Protocol):
    """A run of an experiment tracker."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the metrics of a step; steps only increase."""
        ...

    def image(self, name: str, file: Path, step: int) -> None:
        """Takes a picture, a PNG file."""
        ...

    def finish(self, failed: bool) -> None:
        """Sends what is left; whether the run ended before its last step."""
        ...


class Wandb:
    """A run of W&B; WANDB_MODE=offline and its other variables work as elsewhere."""

    def __init__(self, module: ModuleType, run: TrackedRun):
        self._module = module
        self._run = module.init(
            project=run.project,
            name=run.folder.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(metrics), step=step)

    def image(self, name: str, file: Path, step: int) -> None:
        """See `Tracker`."""
        self._run.log({name: self._module.Image(str(file))}, step=step)

    def finish(self, failed: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio, on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say otherwise."""

    def __init__(self, module: ModuleType, run: TrackedRun):
        self._module = module
        self._run = module.init(
            project=run.project,
            name=f"{run.folder.name}-{run.id}",  # trackio finds runs again by their names
            resume="allow",
            config=dict(run.settings),
            embed=False,
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(metrics), step=step)

    def image(self, name: str, file: Path, step: int) -> None:
        """See `Tracker`."""
        self._run.log({name: self._module.Image(str(file))}, step=step)

    def finish(self, failed: bool) -> None:
        """See `Tracker`."""
        self._run.finish()


TRACKERS: dict[TrackerName, Callable[[ModuleType, TrackedRun], Tracker]] = {"wandb": Wandb, "trackio": Trackio}


def find_package(name: TrackerName) -> ModuleType:
    """The package of a tracker.

    Raises:
        UserError: it is not installed; names the extra that has it.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"--track {name}: the package cannot be imported ({error}); pip install 'flax-pref[{name}]', or leave the "
            "flag out"
        ) from error
    if not hasattr(module, "init"):  # a folder of this name in the current one
        raise UserError(f"--track {name}: {name} is no package but a folder; pip install 'flax-pref[{name}]'")
    return module


class RunTracker:
    """The tracker of a run: tells it nothing twice, and gives up on it where it fails, for the run matters more.

    A context manager that ends the tracker's run.
    """

    def __init__(
        self, name: TrackerName, project: str, folder: Path, settings: Mapping[str, Any], told: tuple[int, int]
    ):
        """Begins a run of the tracker, or continues the one that the folder was tracked by.

        Args:
            name: of the tracker.
            project: of the tracker.
            folder: of the run.
            settings: of the run, values that JSON can hold.
            told: steps of the last metrics and pictures that the files of the run had before it resumed.

        Raises:
            UserError: the package is missing, or the tracker cannot begin.
            OSError: `tracker.json` cannot be written.
        """
        module, file = find_package(name), folder / TRACKED
        known = read_json(file, expected="the tracker of a run") if file.is_file() else {}
        mine = known.get(name, {})
        resumes = mine.get("project") == project and isinstance(mine.get("id"), str)
        run = TrackedRun(folder, project, mine["id"] if resumes else uuid.uuid4().hex[:8], settings)
        self._name, (self._metrics, self._pictures) = name, told if resumes else (0, 0)
        try:
            self._tracker: Tracker | None = TRACKERS[name](module, run)
        except Exception as error:  # of any kind: a login, the network, a project that does not exist
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"--track {name}: cannot begin a run ({reason}); log in, set its offline mode (WANDB_MODE=offline), or "
                "leave the flag out"
            ) from error
        with writing(file), replacing(file) as unfinished:
            write_json(unfinished, {**known, name: {"project": project, "id": run.id}})

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Tells the metrics of a step, without those that are None, unless the tracker has them."""
        if self._tracker is not None and step > self._metrics:
            with self._guarded():
                self._tracker.log({name: value for name, value in metrics.items() if value is not None}, step)

    def image(self, name: str, file: Path, step: int) -> None:
        """Tells a picture, unless the tracker has it."""
        if self._tracker is not None and step > self._pictures:
            with self._guarded():
                self._tracker.image(name, file, step)

    def __enter__(self) -> "RunTracker":
        return self

    def __exit__(self, kind, *exception) -> None:
        if self._tracker is not None:
            with self._guarded():
                self._tracker.finish(kind is not None)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = None
            reason = " ".join(str(error).split()) or type(error).__name__
            tqdm.write(f"{self._name}: tracks no longer ({reason}); the run continues, its files have all", sys.stderr)
