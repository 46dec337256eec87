"""What a user sees of a run: its progress, its metrics, its pictures, a profile of some steps.

    metrics.jsonl        a JSON object for each recorded step, each step once
    tensorboard/         the same and the pictures, for TensorBoard
    samples/000100.png   contact sheet of step 100
    profile/             traces of JAX's profiler

What is written is flushed at once: a run that is killed loses the steps that were under way, and makes them again.
"""

import contextlib
import json
import math
import statistics
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from flax_pref.config import UserError
from flax_pref.files import replacing, writing
from flax_pref.images.grid import image_grid
from flax_pref.training.tensorboard import Event, EventsWriter, SessionLog, Summary
from flax_pref.training.trackers import RunTracker

METRICS, TENSORBOARD, SAMPLES, PROFILE = "metrics.jsonl", "tensorboard", "samples", "profile"


class Recorder:
    """Shows a progress bar and writes metrics and pictures; also a context manager.

    Devices never wait for it: metrics are fetched `lag` steps after they were handed over, when that step is done and
    later ones are under way. All processes of a program call the same methods and are told the same metrics; the first
    one shows and writes.

    A line of metrics.jsonl has the objective's metrics of that very step, and of the steps since the line before

    - `step_seconds`: mean time from the end of a step to the end of the next;
    - `pairs_per_second_per_chip`, after `unit`;
    - `model_tflops`: 1e12 floating-point operations per second and chip;
    - `share_of_peak`.

    Numbers that are not finite, and times where none were taken, are null.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        total: int,
        per_step: int,
        chips: int,
        first: int = 0,
        unit: str = "pair",
        flops: float | None = None,
        peak: float | None = None,
        every: int = 10,
        lag: int = 2,
        show: bool = True,
        tracker: RunTracker | None = None,
    ):
        """Creates the files, or continues those of a run: what they have of steps after `first` is removed.

        Args:
            folder: of the run, on a disk of this machine or one that it has mounted.
            total: number of steps at which the run ends.
            per_step: pairs, or whatever `unit` says, in the global batch of one step.
            chips: devices of the mesh.
            first: number of steps made before, those of the checkpoint that the run resumes from.
            unit: what a batch consists of.
            flops: floating-point operations of a step on all devices (`parallel.peak.step_flops`), unless `add` is told
                others; None: not recorded.
            peak: FLOP/s of a device at best (`parallel.peak.peak_of`); None: not known, its share is not recorded.
            every: steps that this divides are recorded, and the last one.
            lag: steps under way while the one before them is waited for.
            show: a progress bar.
            tracker: gets the same metrics and pictures.

        Raises:
            UserError: metrics.jsonl is not what this class has written; or the folder is in a bucket.
            OSError: the files cannot be written.
            ValueError: every is less than 1 or lag less than 0.
        """
        if every < 1 or lag < 0:
            raise ValueError(f"every={every}, lag={lag}: expected 1 or more, and 0 or more")
        writes = jax.process_index() == 0
        self._total, self._every, self._lag = total, every, lag
        self._unit, self._per_step, self._chips, self._flops, self._peak = unit, per_step, chips, flops, peak
        self._log = _Log(folder, first) if writes else None
        self._tracker = tracker
        self._bar = tqdm(total=total, initial=first, desc="training", unit="step", disable=not (show and writes))
        self._added = first
        self._under_way: deque[tuple[int, Mapping[str, Any], float | None]] = deque()
        self._newest: dict[str, Any] | None = None
        self._clock: float | None = None  # when the newest step was done; None: it was not followed at once
        self._seconds: list[float] = []  # of steps since the last record, and the operations of each
        self._operations: list[float] = []

    def add(self, step: int, metrics: Mapping[str, Any], flops: float | None = None) -> dict[str, Any] | None:
        """Takes the metrics of a step that was dispatched, and returns when the step `lag` before is done.

        Args:
            step: number of steps made with this one; one more than that of the call before.
            metrics: scalars by name, of JAX or Python.
            flops: floating-point operations of this step, where steps differ; None: those that all have.

        Returns:
            `step` and the metrics of the newest step that is done, numbers of Python; None: none is.

        Raises:
            OSError: a file cannot be written, e.g. because the disk is full.
            ValueError: another step was expected.
        """
        if step != self._added + 1:
            raise ValueError(f"metrics of step {step}, but those of step {self._added + 1} are expected")
        self._added = step
        self._under_way.append((step, metrics, self._flops if flops is None else flops))
        return self._fetch(leave=self._lag)

    def flush(self) -> dict[str, Any] | None:
        """Waits for all steps and writes what is to be recorded of them.

        To be called before a checkpoint is saved, so that a run that resumes from it has no gap; and before anything
        else that takes time, such as samples, which then counts in no step's time.

        Returns:
            as `add`.
        """
        newest = self._fetch(leave=0)
        self._clock = None
        return newest

    def images(self, step: int, images: np.ndarray, names: Sequence[str]) -> None:
        """Writes a contact sheet.

        Args:
            step: number of steps made.
            images: uint8 `[N, H, W, 3]`.
            names: N names or prompts.

        Raises:
            OSError: a file cannot be written.
        """
        if self._log is not None:
            sheet = self._log.images(step, images, names)
            if self._tracker is not None:
                self._tracker.image(SAMPLES, sheet, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        try:
            self.flush()
        finally:
            self._release()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind, *exception) -> None:
        if kind is None:
            self.close()
        else:  # steps under way may never be done
            self._release()

    def _fetch(self, *, leave: int) -> dict[str, Any] | None:
        while len(self._under_way) > leave:
            step, metrics, flops = self._under_way.popleft()
            values = {name: np.asarray(value).item() for name, value in jax.device_get(dict(metrics)).items()}
            now = time.perf_counter()
            if self._clock is not None:
                self._seconds.append(now - self._clock)
                self._operations.append(flops or 0.0)
            self._clock = now
            self._newest = {"step": step, **values}
            self._bar.update()
            if step % self._every == 0 or step == self._total:
                self._record(step, values)
        return self._newest

    def _record(self, step: int, values: dict[str, Any]) -> None:
        seconds = statistics.fmean(self._seconds) if self._seconds else None
        flops_of_step = statistics.fmean(self._operations) if self._operations else None
        self._seconds.clear()
        self._operations.clear()
        rate = None if seconds is None else self._per_step / seconds
        speed = {"step_seconds": seconds, f"{self._unit}s_per_second_per_chip": rate and rate / self._chips}
        if self._flops is not None:
            flops = seconds and flops_of_step and flops_of_step / seconds / self._chips
            speed["model_tflops"] = flops and flops / 1e12
            if self._peak is not None:
                speed["share_of_peak"] = flops and flops / self._peak
        if self._log is not None:
            self._log.scalars(step, values | speed)
        if self._tracker is not None:
            self._tracker.log(values | speed, step)
        shown = {"loss": values.get("loss"), f"{self._unit}s/s": rate}
        shown = {name: f"{value:.4g}" for name, value in shown.items() if value is not None}
        self._bar.set_postfix(shown, refresh=False)

    def _release(self) -> None:
        with contextlib.suppress(OSError):  # stderr may be a file on the same full disk
            self._bar.close()
        if self._log is not None:
            self._log.close()


class _Log:
    """The files of a run from a step on."""

    def __init__(self, folder: str | Path, first: int):
        if "://" in str(folder):
            raise UserError(f"{folder}: metrics need a folder on a disk; choose another, or mount the bucket")
        folder = Path(folder)
        self._file, self._tensorboard, self._samples = (folder / name for name in (METRICS, TENSORBOARD, SAMPLES))
        with _writing(self._file):
            folder.mkdir(parents=True, exist_ok=True)
            _keep_until(self._file, first)
            self._lines = self._file.open("a", encoding="utf-8")
        for step, sheet in _sheets(folder).items():
            if step > first:
                sheet.unlink()
        with _writing(self._tensorboard):
            self._tensorboard.mkdir(exist_ok=True)
            # SummaryWriter writes in a thread: when that fails on a full disk, training would wait for it forever. Its
            # files are named after the second; two runs may begin in one.
            self._events = EventsWriter(str(self._tensorboard / "events"), f".{uuid.uuid4().hex[:8]}")
            # TensorBoard forgets what it has read of this step and later ones.
            self._event(first + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        with _writing(self._file):
            self._lines.write(json.dumps({"step": step, **values} | _nulls(values), allow_nan=False) + "\n")
            self._lines.flush()
        told = [Summary.Value(tag=name, simple_value=x) for name, x in values.items() if x is not None]
        with _writing(self._tensorboard):
            self._event(step, summary=Summary(value=told))

    def images(self, step: int, images: np.ndarray, names: Sequence[str]) -> Path:
        sheet = self._samples / f"{step:06}.png"
        with _writing(sheet):
            image_grid({f"step {step}": images.astype(np.float32) / 255}, names, sheet)
        with Image.open(sheet) as opened:
            width, height = opened.size
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=sheet.read_bytes())
        with _writing(self._tensorboard):
            self._event(step, summary=Summary(value=[Summary.Value(tag=SAMPLES, image=image)]))
        return sheet

    def _event(self, step: int, **what) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **what))
        self._events.flush()

    def close(self) -> None:
        # All is written; what is left after an error cannot be.
        for stream in (self._lines, self._events):
            with contextlib.suppress(OSError):
                stream.close()


def last_recorded(folder: str | Path) -> tuple[int, int]:
    """Steps of the last metrics and of the last contact sheet in the files of a run, 0 where there are none.

    A run that resumes removes what they have of steps after its checkpoint; a tracker cannot.
    """
    file, metrics = Path(folder) / METRICS, 0
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, IndexError):  # `_Log` says what is wrong
        metrics = int(json.loads(file.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()[-1])["step"])
    return metrics, max(_sheets(Path(folder)), default=0)


def _sheets(folder: Path) -> dict[int, Path]:
    """Contact sheets by their steps."""
    return {int(sheet.stem): sheet for sheet in (folder / SAMPLES).glob("*.png") if sheet.stem.isdecimal()}


def _writing(path: Path) -> contextlib.AbstractContextManager[None]:
    return writing(path, "which resumes from the last checkpoint")


def _nulls(values: Mapping[str, Any]) -> dict[str, None]:
    """Those values that JSON does not have."""
    return {name: None for name, x in values.items() if x is not None and not math.isfinite(x)}


def _keep_until(file: Path, last: int) -> None:
    """Removes the lines of steps after `last`, and what a killed run has left of a line."""
    if not file.exists():
        return
    text = file.read_text(encoding="utf-8", errors="replace")
    *lines, _ = text.split("\n")
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{file}:{number}: not a JSON object with a step; repair or move the file") from None
        if step <= last:
            kept.append(f"{line}\n")
    if "".join(kept) != text:
        with replacing(file) as unfinished:
            unfinished.write_text("".join(kept), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Profile


class Profile:
    """Traces some steps with JAX's profiler, on every process; also a context manager."""

    def __init__(self, folder: str | Path, first: int, steps: int):
        """Begins nothing yet.

        Args:
            folder: of the run; traces come into its folder profile.
            first: the first step that is traced, counted from 1.
            steps: how many are.

        Raises:
            ValueError: first or steps is less than 1.
        """
        if first < 1 or steps < 1:
            raise ValueError(f"profile of {steps} steps from step {first}: expected 1 or more of each")
        self._folder, self._first, self._end = Path(folder) / PROFILE, first, first + steps
        self._tracing = False

    def at(self, step: int, state: Any) -> None:
        """To be called before a step is dispatched.

        Args:
            step: its number.
            state: arrays that it begins with. They are waited for where the trace begins and where it ends, so that
                the trace has those steps and no others.
        """
        inside = self._first <= step < self._end
        if inside != self._tracing:
            jax.block_until_ready(state)
            if inside:
                jax.profiler.start_trace(self._folder)
                self._tracing = True
            else:
                self.close()

    def close(self) -> None:
        """Ends the trace if one has begun; to be called when the steps in it are done."""
        if not self._tracing:
            return
        self._tracing = False
        jax.profiler.stop_trace()
        if jax.process_index() == 0:
            tqdm.write(f"{self._folder}: profile from step {self._first} on; see it with xprof or Perfetto")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
