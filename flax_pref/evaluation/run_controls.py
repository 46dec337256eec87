"""Draws controls of the base model, scores them with the methods, and writes the report that compares all.

What a method gains over its base model may be had without preferences, by spending as much: these runs show what.

- tuned-cfg: the base model at the guidance scale that is best on other prompts.
- more-steps: the base model with as many more steps as the most expensive method spends more predictions.
- best-of-N: the best by a reward of N images of the base model, where N times its predictions are at least as many.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from flax_pref.config import UserError
from flax_pref.data.prompts import Prompt, read_prompts
from flax_pref.evaluation.comparison import read_run
from flax_pref.evaluation.control_flags import ControlFlags
from flax_pref.evaluation.report_flags import ReportFlags
from flax_pref.evaluation.run_report import methods_of, report_runs
from flax_pref.evaluation.run_scoring import score_runs
from flax_pref.evaluation.runs import SCORE, ImageFile, ImageRun, open_run, read_image
from flax_pref.evaluation.score_flags import ScoreFlags
from flax_pref.evaluation.tables import text_table
from flax_pref.images.cost import ImageCost, read_cost, write_cost
from flax_pref.images.image_flags import ImageFlags
from flax_pref.images.image_set import ImageSet
from flax_pref.images.layouts import Item
from flax_pref.images.set_drawing import ImageWork, draw_images, resolve_images
from flax_pref.programs import title

WRITTEN_AT_ONCE = 64  # images of the best


class Stopped(Exception):
    """A signal has stopped a drawing; what is drawn is kept."""


class Base(NamedTuple):
    """The run of the base model.

    Attributes:
        folder: of its images.
        flags: that it was drawn with.
        settings: of its image set.
        cost: of an image.
        prompts: in their order.
        seeds: of every prompt, in ascending order.
    """

    folder: str
    flags: ImageFlags
    settings: dict[str, Any]
    cost: ImageCost
    prompts: list[Prompt]
    seeds: list[int]


def run_controls(flags: ControlFlags) -> Path | None:
    """Draws, scores and compares, or does what is left of it after a kill.

    Returns:
        the folder of the report; None: a signal has stopped a drawing.

    Raises:
        UserError, ValueError, OSError: the runs cannot be compared, or what the flags ask for cannot be had.
    """
    folders = methods_of(flags.runs)
    base, budget = _check(flags, folders)
    by = flags.by or flags.rewards[0].partition("=")[0]
    told = f"{budget} UNet predictions per image, the base model {base.cost.predictions}"
    print(f"controls may spend {told}")
    try:
        controls = [_tuned(flags, base, by)]
        if budget > base.cost.predictions:
            steps = round(base.flags.steps * budget / base.cost.predictions)
            controls.append(_drawn(base, Path(flags.out) / "more-steps", steps=steps))
            controls.append(_best_of(flags, base, by, math.ceil(budget / base.cost.predictions)))
        else:
            print("no method spends more than the base model: more steps and the best of several are left out")
    except Stopped:
        print("stopped; the same command resumes there")
        return None
    _score(flags, [*folders.values(), *controls], flags.rewards)
    named = [f"{name}={folder}" for name, folder in folders.items()]
    return report_runs(
        ReportFlags(
            runs=(*named, *(f"{Path(control).name}={control}" for control in controls)),
            controls=tuple(Path(control).name for control in controls),
            out=str(Path(flags.out) / "report"),
        )
    )


def _check(flags: ControlFlags, folders: dict[str, str]) -> tuple[Base, int]:
    """The base model's run, and the predictions that a control may spend; before anything is drawn."""
    prompts, others = (read_prompts(file, column=flags.column) for file in (flags.prompts, flags.validation))
    if shared := {prompt.text for prompt in prompts} & {prompt.text for prompt in others}:
        raise UserError(
            f"--validation {flags.validation}: {len(shared)} of its prompts are among those of {flags.prompts}, e.g. "
            f"{min(shared)[:60]!r}; expected other prompts"
        )
    expected = [(prompt.id, prompt.text) for prompt in prompts]
    seeds: list[int] = []
    costs: dict[str, ImageCost | None] = {}
    for name, folder in folders.items():
        run = open_run(folder)
        keys = list(zip(*(run.rows[column].to_pylist() for column in ("prompt_id", "prompt", "seed")), strict=True))
        own = sorted({seed for _, _, seed in keys})
        if sorted(keys) != sorted((*prompt, seed) for prompt in expected for seed in own):
            raise UserError(
                f"{folder}: is not of every prompt of {flags.prompts} with the same seeds; expected the file that it "
                "was drawn from"
            )
        if seeds not in ([], own):
            first = next(iter(folders.values()))
            raise UserError(f"{folder}: has seeds {own[:5]}, and {first} {seeds[:5]}; draw it with the same")
        seeds, costs[name] = own, read_cost(folder)
    first, *methods = folders
    work = _work_of(open_run(folders[first]), flags, seeds)
    cost = costs[first] or ImageCost(work.predictions)
    budget = flags.predictions
    if budget is None:
        known = {name: own for name in methods if (own := costs[name]) is not None}
        if unknown := [folders[name] for name in methods if name not in known]:
            raise UserError(
                f"{unknown[0]}: has no cost.json, so what an image of it costs is not known; pass --predictions with "
                "the UNet predictions per image, or draw it again"
            )
        budget = max(own.predictions for own in known.values())
    return Base(folders[first], work.flags, dict(work.settings), cost, prompts, seeds), budget


def _work_of(run: ImageRun, flags: ControlFlags, seeds: Sequence[int]) -> ImageWork:
    """The work that the base model's run was, from the settings that its manifest tells."""
    settings = json.loads(run.rows["settings"][0].as_py())
    names = {field.name for field in dataclasses.fields(ImageFlags)}
    given: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in settings.items() if name in names
    }
    if given.get("rule", "") != "cfg" or json.loads(run.rows["modules_sha256"][0].as_py() or "{}"):
        raise UserError(
            f"{run.folder}: is no run of {title('sample')} with a base model alone (rule "
            f"{given.get('rule', 'unknown')!r}); expected the base model first, then the methods"
        )
    given |= {"prompts": flags.prompts, "seeds": ",".join(map(str, seeds))}
    given |= {"batch_size": flags.batch_size, "mesh": flags.mesh, "hosts": "none", "column": flags.column}
    work = resolve_images(ImageFlags(**given))
    drawn, now = run.rows["model_sha256"][0].as_py(), work.settings.get("model_sha256", "")
    if drawn != now:
        raise UserError(
            f"{run.folder}: was drawn with other weights ({drawn[:8]}) than {work.flags.model} has now ({now[:8]}); "
            "draw it again"
        )
    return work


def _drawn(base: Base, folder: Path, **changes: Any) -> str:
    """The folder of a run of the base model with other flags, drawn where it is not."""
    print(f"{folder}:")
    if not draw_images(dataclasses.replace(base.flags, out=str(folder), **changes)):
        raise Stopped
    return str(folder)


def _score(flags: ControlFlags, folders: Sequence[str], rewards: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    return score_runs(
        ScoreFlags(
            runs=tuple(folders),
            rewards=tuple(rewards),
            tokenizer=flags.tokenizer,
            clip=flags.clip,
            batch_size=flags.batch_size,
            mesh=flags.mesh,
            hosts="none",
        )
    )


def _tuned(flags: ControlFlags, base: Base, by: str) -> str:
    """The base model at the guidance scale whose images of the validation prompts have the best mean."""
    scales, folder = sorted(set(flags.guidance_scales)), Path(flags.out) / "validation"
    chosen = [reward for reward in flags.rewards if reward.partition("=")[0] == by]
    means = []
    for scale in scales:
        place = folder / f"scale-{scale:g}"
        _drawn(base, place, prompts=flags.validation, guidance_scale=f"{scale:g}")
        scores = _score(flags, [str(place)], chosen)[str(place)][by]
        means.append(float(scores[np.isfinite(scores)].mean()) if np.isfinite(scores).any() else -math.inf)
    best = int(np.argmax(means))
    rows = [["guidance scale", f"mean {by}, validation", ""]]
    rows += [
        [f"{s:g}", f"{mean:.4f}", "chosen" * (i == best)] for i, (s, mean) in enumerate(zip(scales, means, strict=True))
    ]
    print(text_table(rows))
    if best in (0, len(scales) - 1):
        print(f"the best guidance scale is at the end of those tried, {scales[best]:g}: add more to --guidance-scales")
    return _drawn(base, Path(flags.out) / "tuned-cfg", guidance_scale=f"{scales[best]:g}")


def _best_of(flags: ControlFlags, base: Base, by: str, count: int) -> str:
    """Writes a run of the best by a reward of the base model's image and `count` - 1 others of the same prompt."""
    chosen = [reward for reward in flags.rewards if reward.partition("=")[0] == by]
    unused = [seed for seed in range(count * len(base.seeds) + max(base.seeds) + 1) if seed not in base.seeds]
    more = unused[: (count - 1) * len(base.seeds)]
    candidates = _drawn(base, Path(flags.out) / "candidates", seeds=",".join(map(str, more)))
    _score(flags, [base.folder, candidates], chosen)
    found: dict[tuple[int, int], tuple[float, str, ImageFile]] = {}  # by prompt and seed of the base model
    for folder, seeds in ((base.folder, base.seeds), (candidates, more)):
        for row in _scored_rows(folder, by):
            key = row["prompt_id"], base.seeds[seeds.index(row["seed"]) % len(base.seeds)]
            image = ImageFile(*(row[name] for name in ImageFile._fields))
            if key not in found or row["score"] > found[key][0]:
                found[key] = row["score"], folder, image
    name = f"best-of-{count}"
    settings = base.settings | {"best_of": count, "best_by": by}
    items = [Item(prompt, seed) for prompt in base.prompts for seed in base.seeds]
    images = ImageSet(Path(flags.out) / name, items, settings)
    with images.only_writer():
        images.begin()
        pending = images.pending
        for start in range(0, len(pending), WRITTEN_AT_ONCE):
            indices = pending[start : start + WRITTEN_AT_ONCE]
            keys = [(items[i].prompt.id, items[i].seed) for i in indices]
            images.write(indices, np.stack([_read(*found[key][1:]) for key in keys]))
        images.finish()
    cost = base.cost
    seconds = None if cost.seconds is None else count * cost.seconds
    write_cost(images.folder, ImageCost(count * cost.predictions, seconds, cost.devices))
    return str(images.folder)


def _scored_rows(folder: str, by: str) -> list[dict[str, Any]]:
    """Rows of a scored run with "score"; one that is not a finite number is the worst."""
    rows = read_run(folder, folder).table.to_pylist()
    for row in rows:
        score = row[f"{SCORE}{by}"]
        row["score"] = score if score is not None and math.isfinite(score) else -math.inf
    return rows


def _read(folder: str, image: ImageFile) -> np.ndarray:
    """Pixels of an image, uint8 `[H, W, 3]`."""
    pixels = read_image(epath.Path(folder), image)
    if isinstance(pixels, str):
        raise UserError(f"{folder}: {image.file} is {pixels}; draw the run again with --verify")
    return pixels
