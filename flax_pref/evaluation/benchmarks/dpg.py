"""DPG-Bench (arXiv:2403.05135): yes-or-no questions about long prompts, which depend on one another.

The score of an image is the share of its questions with the answer yes, where a question counts as no if one that it
depends on does. The score of a prompt is the mean over its images, the overall score the mean over prompts. Scores of
categories are shares of yes among all questions of a category, without dependencies, about the last image of each
prompt: so the benchmark's own program computes them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from flax_pref.config import UserError
from flax_pref.evaluation.benchmarks.benchmark import Answers, Benchmark, Measure, Shown, matched, stratum, text_of

YES = 0.5  # the least probability that is a yes; the benchmark's own model says a word


def check(record: Mapping[str, Any]) -> None:
    """Raises a UserError where the record is not a prompt with its questions."""
    if not isinstance(record.get("item_id"), str) or not isinstance(record.get("questions"), list):
        raise UserError("has no 'item_id' and 'questions'")


def left_out(record: Mapping[str, Any]) -> str:
    """Why the benchmark's program fails on a prompt and goes past it."""
    ids = {question["id"] for question in record["questions"]}
    for question in record["questions"]:
        for parent in question["dependency"]:
            if parent not in ids and parent != 0:
                return f"{record['item_id']}: question {question['id']} depends on {parent}, which is not asked"
    return "" if ids else f"{record['item_id']}: has no questions"


def read(file: epath.Path, shown: Sequence[Shown]) -> list[Answers]:
    """Yes, 1, or no, 0, to each question about each image, from `..._detail.txt` of `compute_dpg_bench.py`.

    A line of it has the path of a grid, the square in it, a question and the answer. Several processes write into one
    file, so lines of different grids may be in any order.

    Raises:
        UserError: the file is damaged, or about other images or questions.
    """
    records = {image.record["item_id"]: image.record for image in shown}
    found: dict[tuple[str, str], Answers] = {}
    for number, line in enumerate(text_of(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        match = re.fullmatch(r"(.*?), \((\d+), (\d+), (\d+), (\d+)\), (.*), ([^,]*)", line)
        if match is None:
            raise UserError(
                f"{where}: {line!r:.60} is not path, square, question and answer; expected the file ..._detail.txt of "
                "compute_dpg_bench.py"
            )
        item = re.split(r"[/\\]", match[1])[-1].split(".")[0]
        if item not in records:
            raise UserError(
                f"{where}: is about {item!r:.60}, which this run does not show; expected the answers about it"
            )
        if left_out(records[item]):
            continue
        place = 2 * (match[3] != "0") + (match[2] != "0")
        answers = found.setdefault((item, f"image {place}"), [])
        questions = _questions(records[item])
        if len(answers) == len(questions) or match[6] != questions[len(answers)]["question"]:
            wanted = "no more" if len(answers) == len(questions) else repr(questions[len(answers)]["question"])
            raise UserError(
                f"{where}: asks {match[6]!r:.60} about {item}, expected {wanted:.60}; expected the answers to the "
                "questions of this run's prompts, each once"
            )
        answers.append(float(match[7] == "yes"))
    for (item, place), answers in found.items():
        if len(answers) < (count := len(_questions(records[item]))):
            raise UserError(
                f"{file}: {len(answers)} answers to the {count} questions about {item}, {place}; run "
                "compute_dpg_bench.py again"
            )
    asked = [image for image in shown if not left_out(image.record)]
    keys = [(image.record["item_id"], f"image {image.place}") for image in asked]
    every = dict(zip(keys, matched(file, asked, found, keys), strict=True))
    return [every.get((image.record["item_id"], f"image {image.place}"), []) for image in shown]


def _questions(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Keeps the last of questions with the same number, in the first one's place."""
    return list({question["id"]: question for question in record["questions"]}.values())


def questions(record: Mapping[str, Any]) -> list[str]:
    """The questions of a prompt."""
    return [question["question"] for question in _questions(record)]


def score(record: Mapping[str, Any], answers: Answers) -> float:
    """Share of the questions that count as yes."""
    asked = _questions(record)
    yes = {question["id"]: answer >= YES for question, answer in zip(asked, answers, strict=True)}
    for question in asked:  # in this order: where a parent comes later, it is what it was answered
        if not all(yes[parent] for parent in question["dependency"] if parent):
            yes[question["id"]] = False
    return sum(yes.values()) / len(yes)


def measures(shown: Sequence[Shown], answers: Sequence[Answers]) -> list[Measure]:
    """Shares of yes of the categories, first the broad ones, and the overall score."""
    prompts: dict[int, list[float]] = {}
    last: dict[int, int] = {}
    for i, image in enumerate(shown):
        prompts.setdefault(image.prompt_id, []).append(score(image.record, answers[i]))
        if image.prompt_id not in last or image.place > shown[last[image.prompt_id]].place:
            last[image.prompt_id] = i
    broad: dict[str, list[tuple[int, float]]] = {}
    detailed: dict[str, list[tuple[int, float]]] = {}
    for prompt_id, i in last.items():
        for question, value in zip(_questions(shown[i].record), answers[i], strict=True):
            category = question["tuple"].split("(")[0].strip()
            answered = (prompt_id, float(value >= YES))
            detailed.setdefault(category, []).append(answered)
            broad.setdefault(category.split("-")[0].strip(), []).append(answered)
    categories = [*sorted(broad.items()), *(one for one in sorted(detailed.items()) if one[0] not in broad)]
    return [
        *(Measure(name, [stratum(*zip(*answered, strict=True))]) for name, answered in categories),
        Measure("overall", [stratum(prompts, map(np.mean, prompts.values()))]),
    ]


DPG = Benchmark(
    name="dpg",
    prompts="dpg_bench/prompts (with dpg_bench.csv beside it) or dpg_bench.csv",
    places=("*_detail.txt", "grids/*_detail.txt"),
    read=read,
    score=score,
    measures=measures,
    check=check,
    questions=questions,
    left_out=left_out,
)
