"""Methods side by side on the same prompts and seeds: what report.json holds.

`read_run` reads the folders that `sample.score` has scored, `pair_runs` keeps the images that all of them have, and
`compare` computes the report. Each prompt counts once: of several seeds it is the mean. Intervals are 95 % percentile
bootstrap intervals over prompts; a quantity of a single prompt has none.
"""

import collections
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from etils import epath

from flax_pref.data.prompts import natural
from flax_pref.evaluation.benchmarks import BENCHMARKS
from flax_pref.evaluation.benchmarks.benchmark import Answers, Shown, intervals, is_complete, shown_in
from flax_pref.evaluation.runs import ANSWERS, EMBEDDING, PROBLEM, PROBLEMS, SCORE, SCORES
from flax_pref.evaluation.statistics import (
    bootstrap_intervals,
    cluster_means,
    holm,
    pairwise_distances,
    sign_test,
    won,
)
from flax_pref.files import read_json
from flax_pref.images.image_set import MANIFEST_SCHEMA, check_rows, read_table
from flax_pref.programs import command, title

CATEGORIES = ("Category", "Challenge", "category", "challenge", "style", "tag", "atom_count")
STATISTICS = {
    "unit": "prompt; the seeds of a prompt are averaged first",
    "interval": "95 % percentile bootstrap over prompts, 10,000 resamples; none for a single prompt",
    "sign_test": "two-sided exact binomial test of the signs of the prompts' mean differences, without ties",
    "benchmarks": "published formulas, over the images with answers under all methods; what is a mean of tasks is "
    "resampled task by task",
    "correction": "Holm; one family is the overall table (all methods and rewards), each category column, the votes",
}

# Columns that are always there; `group` and `record` are not in older tables.
_COLUMNS = pa.schema(
    [field for field in MANIFEST_SCHEMA if field.name not in ("group", "record")] + [pa.field(PROBLEM, pa.string())]
)


class Key(NamedTuple):
    """What is the same for the images that are compared with one another."""

    prompt_id: int
    prompt: str
    seed: int


class ImageRef(NamedTuple):
    """Where the bytes of an image are, from `offset` on in `file` in `folder`, and its size in pixels."""

    folder: str
    file: str
    offset: int
    size: int
    sha256: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Items:
    """The pairs of a comparison, sorted by prompt id, prompt and seed; all lists and arrays have one entry per pair.

    Attributes:
        prompt_id: int64 `[N]`.
        seed: int64 `[N]`.
        prompt: texts.
        categories: column -> values; "" is none.
        scores: reward -> method -> float64 `[N]`; may be NaN or infinite.
        files: method -> images.
        embeddings: method -> `[N, D]`, of the images; NaN where there is none. Empty if not all runs have them.
        shown: what benchmarks know of the images.
        answers: benchmark -> method -> answers about the images; of benchmarks that all runs have.
    """

    prompt_id: np.ndarray
    seed: np.ndarray
    prompt: list[str]
    categories: dict[str, list[str]]
    scores: dict[str, dict[str, np.ndarray]]
    files: dict[str, list[ImageRef]]
    embeddings: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    shown: list[Shown] = dataclasses.field(default_factory=list)
    answers: dict[str, dict[str, list[Answers]]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def prompts(self) -> np.ndarray:
        """int64 `[N]`: 0 for the pairs of the first prompt, 1 for those of the second ..."""
        keys = list(zip(self.prompt_id.tolist(), self.prompt, strict=True))
        return np.cumsum([0, *(key != before for before, key in itertools.pairwise(keys))])


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@dataclasses.dataclass(frozen=True)
class ScoredRun:
    """A folder of images that has been scored.

    Attributes:
        name: of the method, in the report.
        folder: of the images.
        table: one row per image; the columns of the manifest, `score:<reward>`, `problem`, maybe `answers:<benchmark>`
            and `embedding`.
        rewards: reward -> {"path": ..., "sha256": ...} of its weights.
        embedding: name and SHA-256 ("" if unknown) of the network that the embeddings are from, or None.
    """

    name: str
    folder: str
    table: pa.Table
    rewards: dict[str, dict]
    embedding: tuple[str, str] | None

    @functools.cached_property
    def rows(self) -> dict[Key, int]:
        """Where in the table an image is."""
        columns = [self.table[name].to_pylist() for name in Key._fields]
        return {Key(*key): row for row, key in enumerate(zip(*columns, strict=True))}

    @functools.cached_property
    def problems(self) -> dict[Key, str]:
        """The images that cannot be shown, and why."""
        problems = self.table[PROBLEM].to_pylist()
        return {key: problems[row] for key, row in self.rows.items() if problems[row]}

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What the images were drawn with, the hashes of the weights included; empty for folders of others."""
        first = {name: self.table[name][0].as_py() for name in ("settings", "model_sha256", "modules_sha256")}
        hashes = {
            "model_sha256": first["model_sha256"],
            "modules_sha256": _object(first["modules_sha256"], "modules_sha256"),
        }
        settings = _object(first["settings"], "settings", parse_constant=str)
        return settings | {name: value for name, value in hashes.items() if value}

    @functools.cached_property
    def records(self) -> list[dict[str, Any]]:
        """The row of each image's prompt in the file of prompts; empty in older tables."""
        texts = self.table["record"].to_pylist() if "record" in self.table.column_names else []
        return [_object(text, "record") for text in texts]

    @property
    def w(self) -> float | None:
        """Strength of the modules, where it is one number."""
        try:
            w = float(self.settings["w"])
        except (KeyError, TypeError, ValueError):
            return None
        return w if math.isfinite(w) else None


def read_run(folder: str | os.PathLike, name: str) -> ScoredRun:
    """Reads the scores of a folder.

    Args:
        folder: local or `gs://...`.
        name: of the method.

    Raises:
        FileNotFoundError: there is no such folder, or it has no scores.
        ValueError: the file of scores is damaged or lacks something, or has an image twice.
    """
    file = epath.Path(folder) / SCORES
    again = f"remove it and run {command('score')} {folder} again"
    if not file.exists():
        there = "has not been scored" if epath.Path(folder).is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder}: {there}; run {command('score')} {folder} --rewards ... first")
    try:
        table = read_table(file.read_bytes())
        described = json.loads((table.schema.metadata or {}).get(b"flax_pref", "{}"))
        weights = described.get("embedding_of") or {}
        embedding = (described["embedding"], weights.get("sha256", "")) if EMBEDDING in table.column_names else None
        checked = _checked(table, described["rewards"], described.get("answers", {}))
        run = ScoredRun(name, str(folder), checked, described["rewards"], embedding)
        _ = run.settings, run.records  # damage comes up here, where the file is known
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{file}: not a file of scores as {title('score')} writes them ({reason}): {again}") from error
    if len(run.rows) < len(run.table):
        counts = collections.Counter(zip(*(run.table[name].to_pylist() for name in Key._fields), strict=True))
        twice = Key(*counts.most_common(1)[0][0])
        raise ValueError(f"{file}: has {_told(twice)} more than once; expected one image for each prompt and seed")
    return run


def _checked(table: pa.Table, rewards: Iterable[str], benchmarks: Iterable[str]) -> pa.Table:
    """The columns that are of use here, with the types that are expected."""
    table.validate(full=True)
    types = {field.name: field.type for field in _COLUMNS} | {f"{SCORE}{reward}": pa.float64() for reward in rewards}
    types |= {f"{ANSWERS}{benchmark}": pa.list_(pa.float64()) for benchmark in benchmarks}
    if lacking := [column for column in types if column not in table.column_names]:
        raise ValueError(f"no column {lacking[0]!r}")
    columns = {column: table[column].cast(kind) for column, kind in types.items()}
    columns |= {column: table[column] for column in ("record", "group", EMBEDDING) if column in table.column_names}
    check_rows(pa.table(columns))
    if EMBEDDING in columns and not pa.types.is_fixed_size_list(columns[EMBEDDING].type):
        raise ValueError("embeddings that are no lists of one size")
    if not len(table):
        raise ValueError("no images")
    return pa.table(columns)


def _object(text: str | None, name: str, **options: Any) -> dict[str, Any]:
    """The JSON object in a cell; {} for an empty one."""
    text = text or "{}"
    try:
        values = json.loads(text, **options)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} {text[:40]!r} is not JSON") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} {text[:40]!r} is no JSON object")
    return values


def _told(key: Key) -> str:
    text = key.prompt if len(key.prompt) <= 60 else f"{key.prompt[:60]}..."
    return f"prompt {key.prompt_id} {json.dumps(text, ensure_ascii=False)}, seed {key.seed}"


def common_rewards(runs: Sequence[ScoredRun], wanted: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """The rewards to compare, and those left out because a run lacks them.

    Args:
        runs: at least one.
        wanted: names; empty: all that the runs have in common.

    Raises:
        ValueError: there is none, a run lacks a wanted one, or weights of the same name differ between runs.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.rewards))
    wanted = list(dict.fromkeys(wanted))
    for name in wanted:
        if name not in names:
            raise ValueError(f"--rewards {name}: no run is scored by it; expected of {', '.join(names) or 'none'}")
        if lacking := [run.folder for run in runs if name not in run.rewards]:
            raise ValueError(f"{lacking[0]}: is not scored by {name}; add it with {command('score')} {lacking[0]}")
    common = [name for name in wanted or names if all(name in run.rewards for run in runs)]
    if not common:
        told = "; ".join(f"{run.folder}: {', '.join(run.rewards) or 'none'}" for run in runs)
        raise ValueError(f"the runs have no reward in common ({told}); score them with the same, see {title('score')}")
    for name in common:
        hashes = {run.rewards[name].get("sha256") or "": run.folder for run in runs}
        hashes.pop("", None)
        if len(hashes) > 1:
            told = ", ".join(f"{folder} {sha256[:8]}" for sha256, folder in hashes.items())
            raise ValueError(f"the weights of {name} differ between runs ({told}); score them again with the same")
    return common, [name for name in names if name not in common and not wanted]


def pair_runs(runs: Sequence[ScoredRun], rewards: Sequence[str]) -> Items:
    """The images that all runs have, with the scores by these rewards.

    Raises:
        ValueError: there are none, or a run's scores are not complete.
    """
    shared = set.intersection(*(set(run.rows) for run in runs))
    if not shared:
        told = "; ".join(f"{run.folder} has {_told(min(run.rows))}" for run in runs)
        raise ValueError(f"no prompt and seed is in all runs ({told}); expected runs of the same prompts and seeds")
    keys = sorted(shared.difference(*(run.problems for run in runs)))
    if not keys:
        told = "; ".join(f"{run.folder}: {len(run.problems)} of {len(run.rows)}" for run in runs)
        raise ValueError(f"of every pair an image is missing, changed or unreadable ({told}); draw them again")
    places = {run.name: [run.rows[key] for key in keys] for run in runs}
    return Items(
        prompt_id=np.array([key.prompt_id for key in keys]),
        seed=np.array([key.seed for key in keys]),
        prompt=[key.prompt for key in keys],
        categories=_categories(runs, places),
        scores={name: {run.name: _scores(run, name, places[run.name]) for run in runs} for name in rewards},
        files={run.name: _images(run, places[run.name]) for run in runs},
        embeddings=_embeddings(runs, places),
        **_answers(runs, places),
    )


def _scores(run: ScoredRun, reward: str, places: Sequence[int]) -> np.ndarray:
    column = run.table[f"{SCORE}{reward}"].take(places)
    if column.null_count:
        raise ValueError(
            f"{run.folder}: {column.null_count:,} of {len(column):,} images are not scored by {reward} yet; finish it "
            f"with the same {command('score')} as before"
        )
    return column.to_numpy()


def _images(run: ScoredRun, places: Sequence[int]) -> list[ImageRef]:
    columns = [run.table[name].take(places).to_pylist() for name in ImageRef._fields[1:]]
    return [ImageRef(run.folder, *values) for values in zip(*columns, strict=True)]


def _categories(runs: Sequence[ScoredRun], places: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    """Of the first run that has several: columns of the prompt file, or the groups of the prompts."""
    for run in runs:
        if run.records:
            records = [run.records[place] for place in places[run.name]]
            values = {name: [str(record.get(name) or "") for record in records] for name in CATEGORIES}
            if found := {name: column for name, column in values.items() if len(set(column)) > 1}:
                return found
    for run in runs:
        if "group" in run.table.column_names:
            groups = [group or "" for group in run.table["group"].take(places[run.name]).to_pylist()]
            if len(set(groups)) > 1:
                return {"group": groups}
    return {}


def _answers(runs: Sequence[ScoredRun], places: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """`shown` and `answers` of the benchmarks that all runs have answers of."""
    names = [name for name in BENCHMARKS if all(ANSWERS + name in run.table.column_names for run in runs)]
    if not names or not {"record", "group"} <= set(runs[0].table.column_names):
        return {}
    return {
        "shown": shown_in(runs[0].table.take(places[runs[0].name])),
        "answers": {
            name: {run.name: run.table[ANSWERS + name].take(places[run.name]).to_pylist() for run in runs}
            for name in names
        },
    }


def _embeddings(runs: Sequence[ScoredRun], places: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    if len({run.embedding for run in runs}) > 1 or runs[0].embedding is None:
        return {}
    embeddings = {}
    for run in runs:
        column = run.table[EMBEDDING].take(places[run.name]).combine_chunks()
        there = column.is_valid().to_numpy(zero_copy_only=False)
        embeddings[run.name] = np.full((len(column), column.type.list_size), np.nan, np.float32)
        embeddings[run.name][there] = column.flatten().to_numpy().reshape(there.sum(), -1)
    return embeddings


# ----------------------------------------------------------------------------------------------------------------------
# The report


def compare(runs: Sequence[ScoredRun], items: Items, baseline: str, votes: Sequence["Vote"] = ()) -> dict[str, Any]:
    """What report.json holds; without NaN.

    Args:
        runs: whose names are the methods.
        items: of `pair_runs`.
        baseline: a method.
        votes: of `read_votes`.

    Returns:
        `overall`, `categories`, `benchmarks`, `diversity`, `sweeps` and `votes` are lists of rows. An interval is
        {"value", "low", "high"}, the last two None where there is only one prompt. Comparisons with the baseline
        (`win_rate`, `gain`, `sign_test`, `difference`) are None in its own rows. Of a reward a pair counts if its
        scores are finite under all methods, so that all have the same pairs; `images` says how many have, `not_finite`
        how many scores of the method are not finite. `left_out` are all images of a run that are in no pair.

    Raises:
        ValueError: the scores of a reward are finite in no pair, or votes cannot be counted.
    """
    methods = list(items.files)
    everything = np.ones(len(items.prompt), bool)
    overall = _summaries(items, baseline, everything)
    if absent := next((reward for reward in items.scores if reward not in {row["reward"] for row in overall}), None):
        worst = max(methods, key=lambda method: np.sum(~np.isfinite(items.scores[absent][method])))
        raise ValueError(f"{absent}: no pair has finite scores ({worst} has fewest); leave it out with --rewards")
    categories = []
    for column, values in items.categories.items():
        labels = np.array(values)
        rows = [
            {"column": column, "value": value, **row}
            for value in sorted(set(values) - {""}, key=natural)
            for row in _summaries(items, baseline, labels == value)
        ]
        categories += _corrected(rows)
    return {
        "baseline": baseline,
        "created": datetime.date.today().isoformat(),
        "rewards": list(items.scores),
        "prompts": int(items.prompts[-1]) + 1,
        "pairs": len(items.prompt),
        "statistics": STATISTICS,
        "methods": [_described(run, len(items.prompt)) for run in runs],
        "overall": _corrected(overall),
        "categories": categories,
        "benchmarks": _benchmarks(items, baseline),
        "diversity": _diversity(items, baseline, runs[0].embedding),
        "sweeps": _sweeps(runs, overall),
        "votes": _count_votes(votes, items, baseline),
    }


def _described(run: ScoredRun, pairs: int) -> dict[str, Any]:
    problems = collections.Counter(run.problems.values())
    return {
        "name": run.name,
        "folder": run.folder,
        "settings": run.settings,
        "w": run.w,
        "images": len(run.rows),
        **{problem: problems[problem] for problem in PROBLEMS},
        "left_out": len(run.rows) - pairs,
    }


def _summaries(items: Items, baseline: str, chosen: np.ndarray) -> list[dict[str, Any]]:
    """One row per reward and method, over the pairs `chosen`, bool `[N]`; none of a reward without finite pairs."""
    methods = list(items.files)
    base, count = methods.index(baseline), len(methods)
    scores = {reward: np.stack([by[name] for name in methods], 1) for reward, by in items.scores.items()}
    finite = {reward: np.isfinite(values) for reward, values in scores.items()}
    kept = {reward: chosen & there.all(axis=1) for reward, there in finite.items()}
    by_prompt = {}
    for reward in scores:
        if kept[reward].any():
            values = scores[reward][kept[reward]]
            gain = values - values[:, [base]]
            columns = np.concatenate([values, won(gain), gain], axis=1)
            by_prompt[reward] = cluster_means(columns, items.prompts[kept[reward]])
    intervals = _shared_intervals(by_prompt, {reward: kept[reward].tobytes() for reward in by_prompt})
    rows = []
    for reward, means in by_prompt.items():
        for place, method in enumerate(methods):
            mean, win_rate, gain = intervals[reward][place::count]
            other = place != base
            rows.append(
                {
                    "method": method,
                    "reward": reward,
                    "mean": mean,
                    "win_rate": win_rate if other else None,
                    "gain": gain if other else None,
                    "sign_test": _signs(means[:, 2 * count + place]) if other else None,
                    "prompts": len(means),
                    "images": int(kept[reward].sum()),
                    "not_finite": int((chosen & ~finite[reward][:, place]).sum()),
                }
            )
    return rows


def _shared_intervals(values: Mapping[str, np.ndarray], units: Mapping[str, bytes]) -> dict[str, list[dict]]:
    """`_intervals` of several tables; those with the same units are resampled together."""
    together = collections.defaultdict(list)
    for name in values:
        together[units[name]].append(name)
    intervals = {}
    for names in together.values():
        found = iter(_intervals(np.concatenate([values[name] for name in names], axis=1)))
        intervals |= {name: [next(found) for _ in range(values[name].shape[1])] for name in names}
    return intervals


def _intervals(values: np.ndarray) -> list[dict[str, float | None]]:
    """The means over prompts of `[N, K]` with their intervals."""
    means = values.mean(axis=0).tolist()
    if len(values) < 2:
        return [{"value": mean, "low": None, "high": None} for mean in means]
    ends = bootstrap_intervals(values).tolist()
    return [{"value": mean, "low": low, "high": high} for mean, low, high in zip(means, *ends, strict=True)]


def _signs(differences: np.ndarray) -> dict[str, Any]:
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    return {
        "wins": wins,
        "losses": losses,
        "ties": len(differences) - wins - losses,
        "p": sign_test(wins, losses),
        "p_corrected": None,
    }


def _corrected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, of one family of comparisons, with `p_corrected`."""
    tests = [row["sign_test"] for row in rows if row["sign_test"]]
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_corrected"] = p
    return rows


def _benchmarks(items: Items, baseline: str) -> list[dict[str, Any]]:
    """The published scores of the benchmarks that all runs have, over the images that all have answers about."""
    methods = [baseline, *(method for method in items.files if method != baseline)]
    rows = []
    for name, answers in items.answers.items():
        kept = [i for i in range(len(items.shown)) if all(is_complete(answers[method][i]) for method in methods)]
        shown = [items.shown[i] for i in kept]
        if not shown:
            continue
        measures = [BENCHMARKS[name].measures(shown, [answers[method][i] for i in kept]) for method in methods]
        for same in zip(*measures, strict=True):
            found = dict(enumerate(intervals(same)))
            for method in items.files:
                place = methods.index(method)
                rows.append(
                    {
                        "benchmark": name,
                        "measure": same[0].name,
                        "method": method,
                        "prompts": same[0].prompts,
                        "score": found[place],
                        "difference": found[len(methods) + place - 1] if place else None,
                    }
                )
    return rows


def _diversity(items: Items, baseline: str, embedding: tuple[str, str] | None) -> list[dict[str, Any]]:
    """Mean cosine distance between the images of a prompt, over prompts with several seeds."""
    if not items.embeddings or embedding is None:
        return []
    there = np.all([np.isfinite(e).all(axis=1) & e.any(axis=1) for e in items.embeddings.values()], axis=0)
    there &= np.bincount(items.prompts[there], minlength=len(there))[items.prompts] > 1
    if not there.any():
        return []
    methods = list(items.embeddings)
    distances = np.stack([pairwise_distances(items.embeddings[m][there], items.prompts[there]) for m in methods], 1)
    differences = distances - distances[:, [methods.index(baseline)]]
    intervals = _intervals(np.concatenate([distances, differences], axis=1))
    return [
        {
            "method": method,
            "embedding": embedding[0],
            "prompts": len(distances),
            "distance": intervals[place],
            "difference": None if method == baseline else intervals[len(methods) + place],
        }
        for place, method in enumerate(methods)
    ]


def _sweeps(runs: Sequence[ScoredRun], overall: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each reward, the runs that differ only in w, by w."""
    families = collections.defaultdict(list)
    for run in runs:
        if run.w is not None:
            others = {name: value for name, value in run.settings.items() if name != "w"}
            families[json.dumps(others, sort_keys=True)].append(run)
    families = {shared: sorted(some, key=lambda run: run.w) for shared, some in families.items()}
    families = {shared: some for shared, some in families.items() if some[0].w < some[-1].w}
    cells = {(row["reward"], row["method"]): row for row in overall}
    names = _family_names([some[0].settings for some in families.values()])
    return [
        {
            "reward": reward,
            "family": name,
            "points": [
                {"method": run.name, "w": run.w, **{key: cells[reward, run.name][key] for key in ("mean", "win_rate")}}
                for run in family
            ],
        }
        for reward in dict.fromkeys(row["reward"] for row in overall)
        for name, family in zip(names, families.values(), strict=True)
    ]


def _family_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rule of each family and the settings in which families differ, hashes of weights shortened."""

    def told(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        return text if len(text) <= 40 else hashlib.sha256(text.encode()).hexdigest()[:8]

    names = dict.fromkeys(name for some in settings for name in some if name not in ("rule", "w"))
    differing = [name for name in names if len({told(some.get(name)) for some in settings}) > 1]
    return [
        ", ".join([str(some.get("rule", "w")), *(f"{name}={told(some[name])}" for name in differing if name in some)])
        for some in settings
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Votes


class Vote(NamedTuple):
    """What a person said about the images that two methods drew of one prompt: "left", "right" or "tie"."""

    key: Key
    left: str
    right: str
    vote: str


def read_votes(files: Iterable[str | os.PathLike]) -> list[Vote]:
    """The votes in files that the vote page has exported; of votes about the same images in one file, the last.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one is not as the page writes it.
    """
    return [vote for file in files for vote in _votes_in(file)]


def _votes_in(file: str | os.PathLike[str]) -> list[Vote]:
    expected = "votes exported by the page vote.html"
    content = read_json(Path(file), expected=expected)
    if content.get("kind") != "flax_pref votes" or not isinstance(content.get("votes"), list):
        raise ValueError(f"{file}: not a file of votes; expected {expected}")
    kinds = {"prompt_id": int, "prompt": str, "seed": int, "left": str, "right": str, "vote": str}
    last = {}
    for number, row in enumerate(content["votes"]):
        if not isinstance(row, dict) or any(type(row.get(name)) is not kind for name, kind in kinds.items()):
            raise ValueError(f"{file}: vote {number} is not complete; expected {', '.join(kinds)}: export it again")
        if row["vote"] not in ("left", "right", "tie") or row["left"] == row["right"]:
            raise ValueError(f"{file}: vote {number} is {row['vote']!r} of {row['left']!r} and {row['right']!r}; "
                             "expected left, right or tie of two methods")  # fmt: skip
        vote = Vote(Key(*(row[name] for name in Key._fields)), row["left"], row["right"], row["vote"])
        last[vote.key, frozenset((vote.left, vote.right))] = vote
    return list(last.values())


def _count_votes(votes: Sequence[Vote], items: Items, baseline: str) -> list[dict[str, Any]]:
    """For each method its wins over the baseline; votes about other pairs of methods or other images do not count."""
    if unknown := {name for vote in votes for name in (vote.left, vote.right)} - items.files.keys():
        raise ValueError(
            f"the votes are about {', '.join(sorted(unknown))}; expected of {', '.join(items.files)}: name the runs "
            "as in the report that was voted on, with NAME=FOLDER"
        )
    compared = zip(items.prompt_id.tolist(), items.prompt, items.seed.tolist(), strict=True)
    prompts = dict(zip((Key(*key) for key in compared), items.prompts.tolist(), strict=True))
    rows = []
    for method in items.files:
        counted = [vote for vote in votes if {vote.left, vote.right} == {method, baseline} and vote.key in prompts]
        if counted:
            differences = [0 if v.vote == "tie" else 1 if getattr(v, v.vote) == method else -1 for v in counted]
            columns = np.stack([won(np.array(differences)), differences], axis=1)
            by_prompt = cluster_means(columns, np.array([prompts[vote.key] for vote in counted]))
            rows.append(
                {
                    "method": method,
                    "votes": len(counted),
                    "prompts": len(by_prompt),
                    "win_rate": _intervals(by_prompt[:, :1])[0],
                    "sign_test": _signs(by_prompt[:, 1]),
                }
            )
    if votes and not rows:
        raise ValueError(
            f"none of the {len(votes)} votes is about an image compared here and the baseline {baseline}; expected the "
            "runs that were voted on"
        )
    return [row | row.pop("sign_test") for row in _corrected(rows)]
