"""GenEval (arXiv:2310.11513): does an object detector find what the prompt asks for?

An image is correct or not; of each task this is the share of correct images, and the overall score is the mean over
the tasks, so that each counts the same, however many prompts it has.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

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
    part,
    text_of,
)


def check(record: Mapping[str, Any]) -> None:
    """Raises a UserError where the record is not one of GenEval's metadata."""
    if not isinstance(record.get("tag"), str) or not isinstance(record.get("include"), list):
        raise UserError("has no 'tag' and 'include'")


def read(file: epath.Path, shown: Sequence[Shown]) -> list[Answers]:
    """Whether each image is correct, 1 or 0, from the `results.jsonl` of GenEval's `evaluate_images.py`.

    Lines are about images `<number of the prompt>/samples/<number>.png`, in any order.

    Raises:
        UserError: the file is damaged, or about other images or prompts.
    """
    prompts = {image.prompt_id: image.prompt for image in shown}
    found: dict[tuple[str, str], Answers] = {}
    for number, line in enumerate(text_of(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        row = parsed(line, where)
        fields = {"filename": str, "prompt": str, "tag": str, "correct": bool}
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
        if prompt_id in prompts and prompts[prompt_id] != row["prompt"]:
            raise UserError(
                f"{where}: prompt {prompt_id} is {row['prompt']!r:.60}, but in this run {prompts[prompt_id]!r:.60}; "
                "expected the answers about this run"
            )
        key = (f"prompt {prompt_id}", f"image {place}")
        if key in found:
            raise UserError(f"{where}: a second line about {row['filename']}; expected one per image")
        found[key] = [float(row["correct"])]
    return matched(file, shown, found, [(f"prompt {image.prompt_id}", f"image {image.place}") for image in shown])


def measures(shown: Sequence[Shown], answers: Sequence[Answers]) -> list[Measure]:
    """Share of correct images of each task, of all, of prompts with at least one, and the mean over the tasks."""
    tasks: dict[str, list[int]] = {}
    prompts: dict[int, float] = {}
    for i, (image, (correct,)) in enumerate(zip(shown, answers, strict=True)):
        tasks.setdefault(image.record["tag"], []).append(i)
        prompts[image.prompt_id] = max(correct, prompts.get(image.prompt_id, 0.0))
    parts = {
        tag: of_images([shown[i] for i in places], [answers[i][0] for i in places]) for tag, places in tasks.items()
    }
    return [
        *(Measure(tag, [one]) for tag, one in parts.items()),
        Measure("correct images", [of_images(shown, [correct for (correct,) in answers])]),
        Measure("correct prompts", [part(prompts, prompts.values())]),
        Measure("overall", list(parts.values())),
    ]


GENEVAL = Benchmark(
    name="geneval",
    prompts="evaluation_metadata.jsonl",
    places=("results.jsonl",),
    read=read,
    score=lambda record, answers: answers[0],
    measures=measures,
    check=check,
)
