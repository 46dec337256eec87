"""Parts that the benchmarks share: answers about images, and scores of prompts that are summed up as published.

An answer is a number that a detector, a vision-language model or a rule gave about one image: whether GenEval's
detector saw what the prompt asks for, the probability of "yes" to a question, a score. A benchmark reads the answers
about each image, makes one score of them, and sums up all of them in the measures that its paper prints.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from etils import epath

from flax_pref.config import UserError
from flax_pref.evaluation.statistics import ratio_intervals
from flax_pref.files import unique_keys

Answers = list[float]  # about one image; empty: the benchmark leaves it out


class Shown(NamedTuple):
    """An image of a run, by what a benchmark knows of it.

    Attributes:
        prompt_id: position in the set of prompts.
        prompt: text.
        group: of the prompt.
        record: the prompt's row in its file.
        seed: of the image.
        place: of the seed among those of the prompt, from 0.
    """

    prompt_id: int
    prompt: str
    group: str
    record: Mapping[str, Any]
    seed: int
    place: int


class Stratum(NamedTuple):
    """Values about prompts, of which a measure is the mean.

    Attributes:
        prompts: int64 `[N]`, the prompt that a value is about.
        values: float64 `[N]`.
    """

    prompts: np.ndarray
    values: np.ndarray


class Measure(NamedTuple):
    """A number that a benchmark prints: the mean over its strata of the means of their values.

    Most have one stratum. GenEval's overall score has one for each task, as each of them counts the same there.

    Attributes:
        name: category, or "overall".
        strata: at least one.
    """

    name: str
    strata: list[Stratum]

    @property
    def value(self) -> float:
        """As the authors' program prints it, between 0 and 1."""
        return float(np.mean([stratum.values.mean() for stratum in self.strata]))

    @property
    def prompts(self) -> int:
        """Number of different prompts that it is about."""
        return len(np.unique(np.concatenate([stratum.prompts for stratum in self.strata])))


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark of text-to-image networks.

    Attributes:
        name: in flags and columns.
        prompts: file or folder to draw, for messages.
        places: where in a folder of images the authors' programs leave their answers, as patterns of paths.
        read: answers about each image, from a file or folder of the authors' programs.
        score: one number for an image, from its prompt's record and the answers about it; see `image_score`.
        measures: what the benchmark prints, from images and the answers about them, none of which are empty.
        check: raises a UserError with a reason where a record is not one of the benchmark's prompts.
        questions: texts that a service is asked about an image of this record, each for a number from 0 to 1.
        left_out: why the authors' program leaves out an image of this record; "": it does not.
    """

    name: str
    prompts: str
    places: tuple[str, ...]
    read: Callable[[epath.Path, Sequence[Shown]], list[Answers]]
    score: Callable[[Mapping[str, Any], Answers], float]
    measures: Callable[[Sequence[Shown], Sequence[Answers]], list[Measure]]
    check: Callable[[Mapping[str, Any]], None]
    questions: Callable[[Mapping[str, Any]], list[str]]
    left_out: Callable[[Mapping[str, Any]], str] = lambda record: ""

    def image_score(self, shown: Shown, answers: Answers) -> float:
        """The score of an image; NaN without answers, or where one is not finite."""
        return self.score(shown.record, answers) if is_complete(answers) else math.nan


def shown_in(rows: pa.Table) -> list[Shown]:
    """The images of a manifest, or of a table of scores, in order."""
    columns = [rows[name].to_pylist() for name in ("prompt_id", "prompt", "group", "record", "seed")]
    seeds: dict[int, list[int]] = {}
    for prompt_id, seed in zip(columns[0], columns[4], strict=True):
        seeds.setdefault(prompt_id, []).append(seed)
    places = {(i, seed): place for i, some in seeds.items() for place, seed in enumerate(sorted(some))}
    return [
        Shown(i, prompt, group or "", json.loads(record or "{}"), seed, places[i, seed])
        for i, prompt, group, record, seed in zip(*columns, strict=True)
    ]


def is_complete(answers: Answers | None) -> bool:
    """Whether there are answers, all of them finite."""
    return bool(answers) and all(value is not None and math.isfinite(value) for value in answers)


def complete(shown: Sequence[Shown], answers: Sequence[Answers | None]) -> tuple[list[Shown], list[Answers]]:
    """The images with answers that are all finite, and these answers."""
    kept = [(image, some) for image, some in zip(shown, answers, strict=True) if some and is_complete(some)]
    return [image for image, _ in kept], [some for _, some in kept]


def stratum(prompts: Iterable[int], values: Iterable[float]) -> Stratum:
    """A stratum, from lists."""
    return Stratum(np.array(list(prompts), np.int64), np.array(list(values), np.float64))


def of_images(shown: Sequence[Shown], values: Iterable[float]) -> Stratum:
    """A stratum with one value for each image."""
    return stratum((image.prompt_id for image in shown), values)


def intervals(measures: Sequence[Measure]) -> list[dict[str, float | None]]:
    """Values of a measure under K methods with the same images, each with its 95 % bootstrap interval over prompts.

    Behind these are the differences of all but the first method to the first, which resample the same prompts.

    Args:
        measures: of the K methods, of one name.

    Returns:
        K and K - 1 intervals {"value", "low", "high"}; the last two None where no stratum has more than one prompt.
    """
    strata = []
    for same in zip(*(measure.strata for measure in measures), strict=True):
        _, clusters = np.unique(same[0].prompts, return_inverse=True)
        counts = np.bincount(clusters).astype(np.float64)
        sums = np.stack([np.bincount(clusters, one.values) for one in same], axis=1)
        strata.append((np.concatenate([sums, sums[:, 1:] - sums[:, :1]], axis=1), counts))
    values = [measure.value for measure in measures]
    values += [value - values[0] for value in values[1:]]
    if max(len(counts) for _, counts in strata) < 2:
        return [{"value": value, "low": None, "high": None} for value in values]
    low, high = ratio_intervals(strata).tolist()
    return [{"value": v, "low": a, "high": b} for v, a, b in zip(values, low, high, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# Files of the authors' programs


def text_of(file: epath.Path) -> str:
    """The text of a file.

    Raises:
        UserError: there is no such file, or it is not UTF-8.
    """
    try:
        return file.read_bytes().decode()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{file}: no such file; expected one that the benchmark's program has written") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason}); run the benchmark's program again") from error


def parsed(text: str, where: str) -> Any:
    """The JSON value of a text; `where` is for messages.

    Raises:
        UserError: it is not JSON, or holds a number that is not finite.
    """

    def refuse(number: str) -> float:
        raise ValueError(f"{number} is no score")

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise UserError(f"{where}: not JSON ({reason}); run the benchmark's program again") from error


def probability(value: Any, where: str) -> float:
    """A number between 0 and 1.

    Raises:
        UserError: it is none.
    """
    if type(value) not in (int, float) or not 0 <= value <= 1.0001:  # sums of rounded probabilities may pass 1
        raise UserError(f"{where}: {value!r:.40} is no probability; expected 0 to 1, run the benchmark's program again")
    return float(value)


def matched(
    file: epath.Path, shown: Sequence[Shown], found: Mapping[Any, Answers], keys: Sequence[Any]
) -> list[Answers]:
    """The answers in the order of the images.

    Args:
        file: for messages.
        shown: images.
        found: answers by key.
        keys: of each image; the key itself tells users which image it is.

    Raises:
        UserError: an image has no answers, or there are answers about other images.
    """
    if lacking := [key for key in keys if key not in found]:
        raise UserError(
            f"{file}: no answer about {len(lacking)} of {len(shown)} images, e.g. {_told(lacking[0])}; run the "
            "benchmark's program on all images of this run"
        )
    if other := [key for key in found if key not in set(keys)]:
        raise UserError(
            f"{file}: {len(other)} answers are about images that this run does not have, e.g. {_told(other[0])}; "
            "expected the answers about this run"
        )
    return [found[key] for key in keys]


def _told(key: Any) -> str:
    return ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)
