"""GenEval (arXiv:2310.11513): does an object detector find what the prompt asks for?

Its rules over the boxes of a detector are `judge`. They need no network where the colours of the objects are known.
An image is correct or not; of each task this is the share of correct images, and the overall score is the mean over
the tasks, so that each counts the same, however many prompts it has.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from flax_pref.config import UserError
from flax_pref.evaluation.benchmarks.benchmark import (
    Answers,
    Benchmark,
    Measure,
    Shown,
    matched,
    of_images,
    parsed,
    stratum,
    text_of,
)

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # confidences that objects must exceed; the second for the task "counting"
MOST_OBJECTS = 16  # of a class
POSITION_THRESHOLD = 0.1  # share of the objects' sizes that an offset must exceed
YES = 0.5  # the least answer of a service that is correct


class Detection(NamedTuple):
    """An object in an image, as a detector sees it.

    Attributes:
        label: class, in GenEval's names of the 80 classes of COCO.
        box: left, top, right and bottom, in pixels.
        score: confidence, 0 to 1.
        color: one of GenEval's ten, by a classifier; "": not known.
    """

    label: str
    box: tuple[float, float, float, float]
    score: float
    color: str = ""


def judge(record: Mapping[str, Any], detections: Sequence[Detection]) -> bool:
    """Whether an image shows what its prompt asks for, by GenEval's rules.

    Of each class the most confident objects count. There must be as many as asked for, of the colour asked for, each of
    them in the relation asked for to each of the objects that it refers to, and none too many.

    Args:
        record: "tag", "include" and perhaps "exclude" of the prompt.
        detections: of a detector, in any order.
    """
    least = COUNTING_THRESHOLD if record["tag"] == "counting" else THRESHOLD
    seen: dict[str, list[Detection]] = {}
    # Of objects of one confidence the last one comes first, as in the authors' program.
    for one in sorted(detections, key=lambda one: one.score)[::-1]:
        if one.score > least and len(seen.setdefault(one.label, [])) < MOST_OBJECTS:
            seen[one.label].append(one)
    correct = True
    groups: list[list[Detection] | None] = []  # of objects that are as asked for, by the places of what asks for them
    for wanted in record.get("include", []):
        some = seen.get(wanted["class"], [])[: wanted["count"]]
        matched = len(some) == wanted["count"]
        if matched and "color" in wanted:
            matched = all(one.color == wanted["color"] for one in some)
        if matched and "position" in wanted:
            relation, place = wanted["position"]
            targets = groups[place]
            matched = targets is not None and all(relation in _relations(one, to) for one in some for to in targets)
        correct = correct and matched
        groups.append(some if matched else None)
    few = all(len(seen.get(unwanted["class"], [])) < unwanted["count"] for unwanted in record.get("exclude", []))
    return correct and few


def _relations(one: Detection, to: Detection) -> set[str]:
    """Where an object is of another, by their centres, less a share of their sizes."""
    offsets, rest = [], []
    for axis in (0, 1):
        centre, size = (
            [f(b.box[axis], b.box[axis + 2]) for b in (one, to)]
            for f in (lambda low, high: (low + high) / 2, lambda low, high: abs(high - low))
        )
        offset = centre[0] - centre[1]
        offsets.append(offset)
        rest.append(math.copysign(max(abs(offset) - POSITION_THRESHOLD * sum(size), 0.0), offset))
    if max(map(abs, rest)) < 1e-3:
        return set()
    x, y = (value / math.hypot(*offsets) for value in rest)
    names = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in names.items() if holds}


def check(record: Mapping[str, Any]) -> None:
    """Raises a UserError where the record is not one of GenEval's metadata."""
    if not isinstance(record.get("tag"), str) or not isinstance(record.get("include"), list):
        raise UserError("has no 'tag' and 'include'")


def read(file: epath.Path, shown: Sequence[Shown]) -> list[Answers]:
    """Whether each image is correct, 1 or 0, from the `results.jsonl` of GenEval's `evaluate_images.py`.

    Lines are about images `<number of the prompt>/samples/<number>.png`, in any order. A line may have the boxes of any
    detector instead of an answer, which `judge` then gives: `{"filename": ..., "detections": [{"class": "cup", "box":
    [left, top, right, bottom], "score": 0.9, "color": "red"}, ...]}`, where "color" is needed for prompts with colours.

    Raises:
        UserError: the file is damaged, or about other images or prompts.
    """
    prompts = {image.prompt_id: image.prompt for image in shown}
    records = {image.prompt_id: image.record for image in shown}
    found: dict[tuple[str, str], Answers] = {}
    for number, line in enumerate(text_of(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        row = parsed(line, where)
        fields = {"filename": str, "prompt": str, "tag": str, "correct": bool}
        if isinstance(row, dict) and "detections" in row:
            fields = {"filename": str, "detections": list}
        if not isinstance(row, dict) or any(type(row.get(name)) is not kind for name, kind in fields.items()):
            raise UserError(
                f"{where}: lacks one of {', '.join(fields)}; expected a line of evaluate_images.py, one per image"
            )
        name = re.search(r"(?:^|[/\\])(\d+)[/\\]samples[/\\](\d+)\.png$", row["filename"])
        if name is None:
            raise UserError(
                f"{where}: is about {row['filename']!r:.100}; expected .../00000/samples/0000.png, as --layout geneval "
                "writes them"
            )
        prompt_id, place = int(name[1]), int(name[2])
        if prompt_id in prompts and "prompt" in fields and prompts[prompt_id] != row["prompt"]:
            raise UserError(
                f"{where}: prompt {prompt_id} is {row['prompt']!r:.60}, but in this run {prompts[prompt_id]!r:.60}; "
                "expected the answers about this run"
            )
        key = (f"prompt {prompt_id}", f"image {place}")
        if key in found:
            raise UserError(f"{where}: a second line about {row['filename']}; expected one per image")
        if "detections" not in fields:
            correct = row["correct"]
        elif prompt_id in records:
            correct = judge(records[prompt_id], _detections(row["detections"], records[prompt_id], where))
        else:
            correct = False  # of another run, which is told below
        found[key] = [float(correct)]
    return matched(file, shown, found, [(f"prompt {image.prompt_id}", f"image {image.place}") for image in shown])


def _detections(rows: Sequence[Any], record: Mapping[str, Any], where: str) -> list[Detection]:
    """Boxes of a file; colours must be there of the classes that are asked for in a colour."""
    coloured = {wanted["class"] for wanted in record["include"] if "color" in wanted}
    found = []
    for number, row in enumerate(rows):
        try:
            box = tuple(float(side) for side in row["box"])
            one = Detection(row["class"], box, float(row["score"]), row.get("color", ""))  # pyright: ignore
            if not (isinstance(one.label, str) and len(box) == 4 and all(map(math.isfinite, (*box, one.score)))):
                raise ValueError("not finite numbers")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f'{where}, detection {number}: {row!r:.60}; expected {{"class": "cup", "box": [left, top, right, '
                'bottom], "score": 0.9, "color": "red"}'
            ) from error
        if one.label in coloured and one.score > THRESHOLD and one.color == "":
            raise UserError(
                f"{where}, detection {number}: {one.label} has no color, and the prompt asks for one; expected e.g. "
                '"color": "red"'
            )
        found.append(one)
    return found


def questions(record: Mapping[str, Any]) -> list[str]:
    """What a service with a detector is told of an image: the prompt's line of metadata. It answers 1 for correct."""
    return [json.dumps(dict(record))]


def measures(shown: Sequence[Shown], answers: Sequence[Answers]) -> list[Measure]:
    """Share of correct images of each task, of all, of prompts with at least one, and the mean over the tasks."""
    tasks: dict[str, list[int]] = {}
    prompts: dict[int, float] = {}
    correct = [float(answer >= YES) for (answer,) in answers]
    for i, image in enumerate(shown):
        tasks.setdefault(image.record["tag"], []).append(i)
        prompts[image.prompt_id] = max(correct[i], prompts.get(image.prompt_id, 0.0))
    strata = {tag: of_images([shown[i] for i in places], [correct[i] for i in places]) for tag, places in tasks.items()}
    return [
        *(Measure(tag, [one]) for tag, one in strata.items()),
        Measure("correct images", [of_images(shown, correct)]),
        Measure("correct prompts", [stratum(prompts, prompts.values())]),
        Measure("overall", list(strata.values())),
    ]


GENEVAL = Benchmark(
    name="geneval",
    prompts="evaluation_metadata.jsonl",
    places=("results.jsonl",),
    read=read,
    score=lambda record, answers: float(answers[0] >= YES),
    measures=measures,
    check=check,
    questions=questions,
)
