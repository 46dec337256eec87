"""T2I-CompBench++ (TPAMI 2025): eight categories of prompts, each with scores of a network of its own.

Attributes are scored by BLIP-VQA, spatial relations and numbers by UniDet, other relations by CLIP. The score of a
category is the mean over its images; there is none of all categories. Complex prompts have three scores, and each
image the mean of those that fit its prompt ("3-in-1"), which is computed here.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from flax_pref.config import UserError
from flax_pref.data.prompts import T2I_COMPBENCH as CATEGORIES
from flax_pref.evaluation.benchmarks.benchmark import (
    Answers,
    Benchmark,
    Measure,
    Shown,
    matched,
    of_images,
    parsed,
    text_of,
)

# Where the programs write, in the folder of a category.
BLIP, CLIP = "annotation_blip/vqa_result.json", "annotation_clip/vqa_result.json"
SPATIAL = "labels/annotation_obj_detection_2d/vqa_result.json"
WHOLE = "annotation_3_in_1/vqa_result.json"
PLACES = {
    **dict.fromkeys(("color", "shape", "texture"), BLIP),
    "spatial": SPATIAL,
    "3d_spatial": "labels/annotation_obj_detection_3d/vqa_result.json",
    "numeracy": "annotation_num/vqa_result.json",
    "non_spatial": CLIP,
}
# Of complex prompts, by the relations in their record: what is averaged.
PARTS = {"spatial": (BLIP, SPATIAL), "action": (BLIP, CLIP), "spatial and action": (BLIP, SPATIAL, CLIP)}


def check(record: Mapping[str, Any]) -> None:
    """Raises a UserError where the record has no category of the benchmark."""
    if record.get("category") not in CATEGORIES:
        raise UserError("has no 'category' of T2I-CompBench++")


def read(path: epath.Path, shown: Sequence[Shown]) -> list[Answers]:
    """The score of each image, from the files `vqa_result.json` of the benchmark's programs.

    Args:
        path: a folder with one for each category, as --layout t2i_compbench writes it; or a file, where the run shows
            one category.
        shown: images; those of a category have the numbers 0, 1, ... by prompt and seed.

    Raises:
        UserError: a file is missing, damaged, or about other images.
    """
    places: dict[str, list[int]] = {}
    for i in sorted(range(len(shown)), key=lambda i: (shown[i].prompt_id, shown[i].place)):
        places.setdefault(shown[i].record["category"], []).append(i)
    if not path.is_dir() and len(places) > 1:
        raise UserError(
            f"{path}: is a file, and this run shows {len(places)} categories ({', '.join(places)}); expected a folder "
            "with a folder for each"
        )
    answers: list[Answers] = [[]] * len(shown)
    for category, some in places.items():
        images = [shown[i] for i in some]
        folder = path / category if (path / category).is_dir() else path
        if path.is_dir() and category == "complex":
            found = _complex(folder, images)
        else:
            found = _scores(folder / PLACES[category] if path.is_dir() else path, images)
        for i, value in zip(some, found, strict=True):
            answers[i] = [value]
    return answers


def _complex(folder: epath.Path, images: Sequence[Shown]) -> list[float]:
    """3-in-1 from its parts, or as the benchmark's program has computed it."""
    told = all(image.record.get("relations") in PARTS for image in images)
    if not told or not all((folder / part).exists() for part in (BLIP, SPATIAL, CLIP)):
        if not (folder / WHOLE).exists():
            lacks = [part for part in (BLIP, SPATIAL, CLIP) if not (folder / part).exists()]
            reason = f"no {lacks[0]}" if lacks else "prompts that were drawn without complex_val_action.txt beside"
            raise UserError(
                f"{folder}: {reason}, and no {WHOLE}; expected the scores of the three programs, or of 3_in_1.py"
            )
        return _scores(folder / WHOLE, images)
    parts = {part: _scores(folder / part, images) for part in (BLIP, SPATIAL, CLIP)}
    found = []
    for i, image in enumerate(images):
        names = PARTS[image.record["relations"]]
        found.append(sum(parts[name][i] for name in names) / len(names))
    return found


def _scores(file: epath.Path, images: Sequence[Shown]) -> list[float]:
    """The numbers of a `vqa_result.json`, in the order of the images."""
    rows = parsed(text_of(file), str(file))
    if not isinstance(rows, list):
        raise UserError(f"{file}: holds no list; expected one with question_id and answer of each image")
    found: dict[str, Answers] = {}
    for number, row in enumerate(rows):
        where = f"{file}, row {number}"
        try:
            key, value = f"image {int(row['question_id'])}", float(row["answer"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: {row!r:.60} is not question_id and answer with numbers; run the benchmark's program again"
            ) from error
        if key in found:
            raise UserError(f"{where}: a second answer about {key}; expected one per image")
        if not -1 <= value <= 1:  # cosines of CLIP may be negative; NaN is neither
            raise UserError(f"{where}: answer {row['answer']!r:.40}; expected a score of at most 1")
        found[key] = [value]
    keys = [f"image {number}" for number in range(len(images))]
    return [value for (value,) in matched(file, images, found, keys)]


def questions(record: Mapping[str, Any]) -> list[str]:
    """What a service with the benchmark's networks is told of an image: prompt and category. It answers the score."""
    return [json.dumps(dict(record))]


def measures(shown: Sequence[Shown], answers: Sequence[Answers]) -> list[Measure]:
    """The mean of each category."""
    found = []
    for category in CATEGORIES:
        places = [i for i, image in enumerate(shown) if image.record["category"] == category]
        if places:
            found.append(Measure(category, [of_images([shown[i] for i in places], [answers[i][0] for i in places])]))
    return found


T2I_COMPBENCH = Benchmark(
    name="t2i_compbench",
    prompts="examples/dataset (or color_val.txt and so on)",
    places=(".",),
    read=read,
    score=lambda record, answers: answers[0],
    measures=measures,
    check=check,
    questions=questions,
)
