"""GenEval 2 (arXiv:2512.16853) and its Soft-TIFA: probabilities that a vision-language model gives right answers.

Each prompt has a list of questions about its atoms: objects, attributes, counts, positions and verbs. The score of an
image is the arithmetic mean of the probabilities (Soft-TIFA AM, about atoms) or their geometric mean (GM, about whole
prompts). The skills are means over atoms, the atomicities means of GM over prompts with as many atoms.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from flax_pref.config import UserError
from flax_pref.evaluation.benchmarks.benchmark import (
    Answers,
    Benchmark,
    Measure,
    Shown,
    of_images,
    parsed,
    probability,
    stratum,
    text_of,
)

SKILLS = ("object", "attribute", "count", "position", "verb")


def check(record: Mapping[str, Any]) -> None:
    """Raises a UserError where the record is not a line of GenEval 2."""
    questions, skills = record.get("vqa_list"), record.get("skills")
    if not isinstance(questions, list) or not isinstance(skills, list) or not isinstance(record.get("atom_count"), int):
        raise UserError("has no 'vqa_list', 'skills' and 'atom_count'")
    if not questions or len(questions) != len(skills):
        raise UserError(f"has {len(questions)} questions and {len(skills)} skills")
    if any(not isinstance(one, list) or [type(text) for text in one] != [str, str] for one in questions):
        raise UserError("has a question without an answer in 'vqa_list'")
    if unknown := [skill for skill in skills if skill not in SKILLS]:
        raise UserError(f"has the skill {unknown[0]!r}, not one of {', '.join(SKILLS)},")


def read(file: epath.Path, shown: Sequence[Shown]) -> list[Answers]:
    """The probabilities about each image, from the score lists that GenEval 2's `evaluation.py` writes.

    Its methods are soft_tifa_am and soft_tifa_gm, which write the same lists: one for each prompt, in their order.

    Raises:
        UserError: the file is damaged, or about other prompts.
    """
    if len({image.place for image in shown}) > 1:
        raise UserError(
            f"{file}: is about one image per prompt, and this run has several; draw one seed with --layout geneval2"
        )
    lists = parsed(text_of(file), str(file))
    if not isinstance(lists, list) or len(lists) != len(shown):
        there = f"{len(lists)} lists" if isinstance(lists, list) else "no list"
        raise UserError(
            f"{file}: holds {there} for {len(shown)} prompts; expected the --output_file of evaluation.py, about all "
            "prompts of this run"
        )
    answers: dict[int, Answers] = {}
    for number, (image, some) in enumerate(zip(sorted(shown, key=lambda image: image.prompt_id), lists, strict=True)):
        where = f"{file}, list {number}"
        asked = image.record["vqa_list"]
        if not isinstance(some, list) or len(some) != len(asked):
            count = len(some) if isinstance(some, list) else "no"
            raise UserError(
                f"{where}: {count} scores for the {len(asked)} questions about {image.prompt!r:.60}; expected "
                "--method soft_tifa_gm, and the prompts of this run"
            )
        answers[image.prompt_id] = [probability(value, where) for value in some]
    return [answers[image.prompt_id] for image in shown]


def questions(record: Mapping[str, Any]) -> list[str]:
    """Yes-or-no questions: those about numbers ask whether the number is the right one."""
    return [
        question if right == "Yes" else f'Is "{right}" the answer to the question "{question}"?'
        for question, right in record["vqa_list"]
    ]


def arithmetic_mean(answers: Answers) -> float:
    """Soft-TIFA AM."""
    return math.fsum(answers) / len(answers)


def geometric_mean(answers: Answers) -> float:
    """Soft-TIFA GM; 0 where one answer is."""
    return 0.0 if min(answers) == 0 else math.exp(math.fsum(map(math.log, answers)) / len(answers))


def measures(shown: Sequence[Shown], answers: Sequence[Answers]) -> list[Measure]:
    """AM of each skill, GM of each atomicity, AM and GM of all."""
    found = []
    for skill in SKILLS:
        atoms = [
            (image.prompt_id, value)
            for image, some in zip(shown, answers, strict=True)
            for value, kind in zip(some, image.record["skills"], strict=True)
            if kind == skill
        ]
        if atoms:
            found.append(Measure(f"{skill} (AM)", [stratum(*zip(*atoms, strict=True))]))
    whole = [geometric_mean(some) for some in answers]
    for atoms in sorted({image.record["atom_count"] for image in shown}):
        places = [i for i, image in enumerate(shown) if image.record["atom_count"] == atoms]
        found.append(
            Measure(f"{atoms} atoms (GM)", [of_images([shown[i] for i in places], [whole[i] for i in places])])
        )
    return [
        *found,
        Measure("overall (AM)", [of_images(shown, map(arithmetic_mean, answers))]),
        Measure("overall (GM)", [of_images(shown, whole)]),
    ]


GENEVAL2 = Benchmark(
    name="geneval2",
    prompts="geneval2_data.jsonl",
    places=("score_lists.json",),
    read=read,
    score=lambda record, answers: geometric_mean(answers),
    measures=measures,
    check=check,
    questions=questions,
)
