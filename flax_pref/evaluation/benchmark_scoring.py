"""Answers of benchmarks about the images of a run: from files of the authors' programs, or from a service.

The table of scores keeps the answers in a column `answers:NAME`, and the score of each image in `score:NAME`, so that
reports compare methods by it as by a reward.
"""

import contextlib
import glob
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from flax_pref.config import UserError
from flax_pref.evaluation.benchmarks import BENCHMARKS, Benchmark
from flax_pref.evaluation.benchmarks.benchmark import Answers, Shown, complete, intervals, is_complete, shown_in
from flax_pref.evaluation.runs import ANSWERS, SCORE, ImageRun, read_image
from flax_pref.evaluation.scoring import Scores
from flax_pref.evaluation.tables import decimals, text_table
from flax_pref.files import difference
from flax_pref.rewards.remote import Function, is_service, load_remote


class NamedBenchmark(NamedTuple):
    """A benchmark, and where its answers come from.

    Attributes:
        benchmark: of the table `BENCHMARKS`.
        path: file or folder of the authors' programs, `http://...` or `python:MODULE:FUNCTION`; None: such a file is in
            the folder of the images.
    """

    benchmark: Benchmark
    path: str | None

    @property
    def is_service(self) -> bool:
        """Whether questions are asked."""
        return is_service(self.path)


def named_benchmarks(texts: Sequence[str], folders: Sequence[str]) -> list[NamedBenchmark]:
    """The benchmarks that a flag gives as NAME, NAME=PATH or NAME=http://...

    Args:
        texts: of the flag.
        folders: of images.

    Raises:
        UserError: one is none of these or there twice, or names one file for several folders.
    """
    asked: dict[str, NamedBenchmark] = {}
    for text in texts:
        name, given, path = text.partition("=")
        if name not in BENCHMARKS or (given and not path):
            raise UserError(
                f"--benchmarks {text}: expected NAME, NAME=FILE or NAME=http://..., with one of {', '.join(BENCHMARKS)}"
            )
        if name in asked:
            raise UserError(f"--benchmarks {text}: {name} is there twice; expected each benchmark once")
        if path and not is_service(path):
            if len(folders) > 1:
                raise UserError(
                    f"--benchmarks {text}: is about one folder, and there are {len(folders)}; score each in a call of "
                    f"its own, or put {BENCHMARKS[name].places[0]} into each and write --benchmarks {name}"
                )
            if not epath.Path(path).exists():
                raise UserError(f"--benchmarks {text}: no file or folder {path}; correct the path")
        asked[name] = NamedBenchmark(BENCHMARKS[name], path or None)
    return list(asked.values())


def answer(
    asked: NamedBenchmark,
    run: ImageRun,
    scores: Scores,
    *,
    batch_size: int = 8,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Completes the answers of a benchmark and the scores of the images, and saves the table.

    Args:
        asked: the benchmark.
        run: whose images it is about.
        scores: of the run.
        batch_size: questions that a service is asked at a time.
        stop: asked after every image.

    Raises:
        UserError: the prompts are not the benchmark's, the file is damaged or about other images, or the service has
            failed.
    """
    benchmark, shown = asked.benchmark, shown_in(run.rows)
    _check_prompts(benchmark, run, shown)
    if asked.is_service:
        of = {"name": benchmark.name, "path": asked.path, "sha256": ""}
        _begin(scores, benchmark, of)
        _ask_service(asked, of, shown, scores, batch_size, stop)
    elif (file := _file_of(asked, run.folder, stored=scores.of(ANSWERS + benchmark.name) is not None)) is not None:
        answers = benchmark.read(file, shown)
        sha256 = hashlib.sha256(json.dumps(answers).encode()).hexdigest()
        of = {"name": benchmark.name, "path": file.name, "sha256": "", "answers_sha256": sha256}
        _begin(scores, benchmark, of)
        for index, some in enumerate(answers):
            _put(scores, benchmark, shown, index, some)
    scores.save()


def _check_prompts(benchmark: Benchmark, run: ImageRun, shown: Sequence[Shown]) -> None:
    for image in shown:
        try:
            benchmark.check(image.record)
        except UserError as error:
            raise UserError(
                f"{run.folder}: prompt {image.prompt_id} {image.prompt!r:.60} {error}; expected images of "
                f"{benchmark.name}, drawn with --prompts {benchmark.prompts}"
            ) from error


def _begin(scores: Scores, benchmark: Benchmark, of: Mapping[str, Any]) -> None:
    before = scores.of(ANSWERS + benchmark.name)
    if before not in (None, of):
        print(f"{scores.folder}: {benchmark.name} is computed again: was {difference(before, of)}")
    scores.begin(ANSWERS + benchmark.name, of)
    scores.begin(SCORE + benchmark.name, of)


def _put(scores: Scores, benchmark: Benchmark, shown: Sequence[Shown], index: int, answers: Answers) -> None:
    scores.put_answers(ANSWERS + benchmark.name, index, answers)
    score = benchmark.image_score(shown[index], answers)
    scores.put(SCORE + benchmark.name, [index], np.array([score], np.float32))


def _file_of(asked: NamedBenchmark, folder: epath.Path, *, stored: bool) -> epath.Path | None:
    """The file that is named, or the one in the folder of the images; None: there is none, but answers are stored."""
    if asked.path is not None:
        return epath.Path(asked.path)
    places = asked.benchmark.places
    if "://" in str(folder):
        found = [folder / place for place in places if "*" not in place and (folder / place).exists()]
    else:
        found = [
            epath.Path(file) for place in places for file in sorted(glob.glob(f"{glob.escape(str(folder))}/{place}"))
        ]
    if not found and stored:
        return None
    if len(found) != 1:
        there = f"{len(found)} files, e.g. {found[0].name}" if found else f"no {' or '.join(places)}"
        raise UserError(
            f"{folder}: {there} in it; name the file of {asked.benchmark.name}'s program, as in --benchmarks "
            f"{asked.benchmark.name}=FILE"
        )
    return found[0]


# ----------------------------------------------------------------------------------------------------------------------
# A service


def _ask_service(
    asked: NamedBenchmark,
    of: Mapping[str, Any],
    shown: Sequence[Shown],
    scores: Scores,
    batch_size: int,
    stop: Callable[[], bool],
) -> None:
    """Asks about the images that are not answered yet, one after the other."""
    benchmark, path = asked.benchmark, asked.path or ""
    try:
        function = load_remote(benchmark.name, path).function
    except ValueError as error:
        raise UserError(f"--benchmarks {benchmark.name}: {error}") from error
    pending = scores.pending(ANSWERS + benchmark.name, of).tolist()
    with (
        ThreadPoolExecutor(1) as pool,
        contextlib.ExitStack() as saved,
        tqdm(desc=f"{scores.folder.name}: {benchmark.name}", unit="image", total=len(pending)) as progress,
    ):
        saved.callback(scores.save)
        ahead = pool.submit(read_image, scores.folder, scores.images[pending[0]]) if pending else None
        for place, index in enumerate(pending):
            assert ahead is not None
            pixels = ahead.result()
            if place + 1 < len(pending):
                ahead = pool.submit(read_image, scores.folder, scores.images[pending[place + 1]])
            if isinstance(pixels, str):
                scores.problems[index] = pixels
            elif benchmark.left_out(shown[index].record):
                _put(scores, benchmark, shown, index, [])
            else:
                texts = benchmark.questions(shown[index].record)
                found: Answers = []
                for start in range(0, len(texts), batch_size):
                    found += _ask(function, benchmark.name, path, pixels, texts[start : start + batch_size])
                _put(scores, benchmark, shown, index, found)
            progress.update()
            scores.save_at_times()
            if stop():
                break


def _ask(function: Function, name: str, path: str, pixels: np.ndarray, questions: list[str]) -> Answers:
    """Numbers from 0 to 1; NaN where the service has no answer."""
    images = np.broadcast_to(pixels.astype(np.float32) / 255, (len(questions), *pixels.shape))
    try:
        answers = np.asarray(function(images, questions), np.float64)
    except Exception as error:  # of a service or a function of the user's: whatever it is, in one line
        raise UserError(f"{name}: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error
    if answers.shape != (len(questions),):
        raise UserError(
            f"{name}: {path} gave {list(answers.shape)} for {len(questions)} questions; expected one number each"
        )
    if (wrong := np.flatnonzero((answers < 0) | (answers > 1))).size:
        raise UserError(
            f"{name}: {path} answered {answers[wrong[0]]:g} to {questions[wrong[0]]!r:.80}; expected 0 to 1, the "
            "probability of yes or the score"
        )
    return answers.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Telling


def told(asked: NamedBenchmark, run: ImageRun, scores: Scores) -> list[str]:
    """Lines for the user about a benchmark of a folder."""
    benchmark = asked.benchmark
    every = scores.answers(ANSWERS + benchmark.name)
    shown = shown_in(run.rows)
    known = [i for i, some in enumerate(every) if some is not None]
    images, answers = complete(shown, every)
    lines = [f"  {benchmark.name}: answers about {len(known)} of {len(shown)} images"]
    column = ANSWERS + benchmark.name
    if left := len(scores.pending(column, scores.of(column) or {})):
        lines[0] += f", stopped with {left} left; the same command resumes there"
    left_out = {image.prompt_id: reason for image in shown if (reason := benchmark.left_out(image.record))}
    if left_out:
        first = next(iter(left_out))
        lines.append(
            f"  {len(left_out)} prompt{'s' * (len(left_out) > 1)} left out, as by the authors' program: e.g. prompt "
            f"{first}, {left_out[first]}"
        )
    unfinished = sum(bool(some) and not is_complete(some) for some in every)
    if unfinished:
        lines.append(
            f"  {unfinished} image{'s' * (unfinished > 1)} left out: the service had no answer to some questions"
        )
    if not images:
        return lines
    rows = []
    for measure in benchmark.measures(images, answers):
        (interval,) = intervals([measure])
        rows.append((measure, interval))
    places = max(4, decimals(interval for _, interval in rows))
    table = [[benchmark.name, "score", "95 % interval", "prompts"]]
    for measure, interval in rows:
        low, high = interval["low"], interval["high"]
        bounds = "" if low is None or high is None else f"[{_fixed(low, places)}, {_fixed(high, places)}]"
        table.append([measure.name, _fixed(measure.value, places), bounds, f"{measure.prompts:,}"])
    return [*lines, *(f"  {line}" for line in text_table(table).splitlines())]


def _fixed(number: float, places: int) -> str:
    """A number with so many digits behind the point, 0 without a sign."""
    return f"{round(number, places) + 0.0:.{places}f}"
