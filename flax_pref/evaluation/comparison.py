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
from flax_pref.evaluation.distances import vendi_score
from flax_pref.evaluation.runs import ANSWERS, DISTANCE, FEATURES, PROBLEM, PROBLEMS, SCORE, SCORES
from flax_pref.evaluation.set_measures import VENDI, Reference, set_notes, set_rows
from flax_pref.evaluation.statistics import (
    bootstrap_intervals,
    cluster_means,
    holm,
    near_duplicates,
    pairwise_distances,
    sign_test,
    won,
)
from flax_pref.files import read_json
from flax_pref.images.cost import read_cost
from flax_pref.images.image_set import MANIFEST_SCHEMA, check_rows, read_table
from flax_pref.programs import command, title

ALIKE = "near-duplicates"
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
        features: network -> method -> `[N, D]`, of the images; NaN where there are none. Only of networks that all runs
            have features of.
        distances: network -> method -> float64 `[P]`, of `pairs`; NaN where there is none.
        shown: what benchmarks know of the images.
        answers: benchmark -> method -> answers about the images; of benchmarks that all runs have.
    """

    prompt_id: np.ndarray
    seed: np.ndarray
    prompt: list[str]
    categories: dict[str, list[str]]
    scores: dict[str, dict[str, np.ndarray]]
    files: dict[str, list[ImageRef]]
    features: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    distances: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    shown: list[Shown] = dataclasses.field(default_factory=list)
    answers: dict[str, dict[str, list[Answers]]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def prompts(self) -> np.ndarray:
        """int64 `[N]`: 0 for the pairs of the first prompt, 1 for those of the second ..."""
        keys = list(zip(self.prompt_id.tolist(), self.prompt, strict=True))
        return np.cumsum([0, *(key != before for before, key in itertools.pairwise(keys))])

    @functools.cached_property
    def sha256(self) -> str:
        """The same for comparisons of the same prompts and seeds."""
        keys = [self.prompt_id.tolist(), self.prompt, self.seed.tolist()]
        return hashlib.sha256(json.dumps(keys).encode()).hexdigest()

    @functools.cached_property
    def pairs(self) -> np.ndarray:
        """int64 `[P, 2]`: all pairs of images of one prompt, by their places here."""
        return pairs_within(self.prompts)


def pairs_within(clusters: np.ndarray) -> np.ndarray:
    """Pairs of neighbours in a sorted list of the clusters' numbers `[N]`, that are of one cluster: int64 `[P, 2]`."""
    counts = np.bincount(clusters)
    starts = np.cumsum(counts) - counts
    found = [start + np.stack(np.triu_indices(count, 1), 1) for start, count in zip(starts, counts, strict=True)]
    return np.concatenate([np.zeros((0, 2), np.int64), *found])


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@dataclasses.dataclass(frozen=True)
class ScoredRun:
    """A folder of images that has been scored.

    Attributes:
        name: of the method, in the report.
        folder: of the images.
        table: one row per image; the columns of the manifest, `score:<reward>`, `problem`, maybe `answers:<benchmark>`,
            `features:<network>` and `distance:<network>`.
        rewards: reward -> {"path": ..., "sha256": ...} of its weights.
        features: network -> the same of its weights.
        distances: network -> the same of its weights.
    """

    name: str
    folder: str
    table: pa.Table
    rewards: dict[str, dict]
    features: dict[str, dict] = dataclasses.field(default_factory=dict)
    distances: dict[str, dict] = dataclasses.field(default_factory=dict)

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
        of = [described["rewards"], described.get("features", {}), described.get("distances", {})]
        run = ScoredRun(name, str(folder), _checked(table, *of, benchmarks=described.get("answers", {})), *of)
        _ = run.settings, run.records  # damage comes up here, where the file is known
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{file}: not a file of scores as {title('score')} writes them ({reason}): {again}") from error
    if len(run.rows) < len(run.table):
        counts = collections.Counter(zip(*(run.table[name].to_pylist() for name in Key._fields), strict=True))
        twice = Key(*counts.most_common(1)[0][0])
        raise ValueError(f"{file}: has {_told(twice)} more than once; expected one image for each prompt and seed")
    return run


def _checked(
    table: pa.Table,
    rewards: Iterable[str],
    features: Iterable[str],
    distances: Iterable[str],
    *,
    benchmarks: Iterable[str],
) -> pa.Table:
    """The columns that are of use here, with the types that are expected."""
    table.validate(full=True)
    types = {field.name: field.type for field in _COLUMNS} | {f"{SCORE}{reward}": pa.float64() for reward in rewards}
    lists = [f"{FEATURES}{name}" for name in features]
    types |= {name: table.schema.field(name).type for name in lists}
    types |= {f"{DISTANCE}{name}": pa.list_(pa.float64()) for name in distances}
    types |= {f"{ANSWERS}{benchmark}": pa.list_(pa.float64()) for benchmark in benchmarks}
    if lacking := [column for column in types if column not in table.column_names]:
        raise ValueError(f"no column {lacking[0]!r}")
    columns = {column: table[column].cast(kind) for column, kind in types.items()}
    columns |= {column: table[column] for column in ("record", "group") if column in table.column_names}
    check_rows(pa.table(columns))
    if odd := [name for name in lists if not pa.types.is_fixed_size_list(columns[name].type)]:
        raise ValueError(f"{odd[0]} holds no lists of one length")
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
    if not names and any(common_networks(runs, kind)[0] for kind in ("features", "distances")):
        return [], []
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
        features={name: _features(runs, name, places) for name in common_networks(runs, "features")[0]},
        distances={name: _distances(runs, name, places) for name in common_networks(runs, "distances")[0]},
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


def common_networks(runs: Sequence[ScoredRun], kind: str) -> tuple[list[str], list[str]]:
    """The networks of which all runs have the features, with the same weights, and those left out.

    Args:
        runs: at least one.
        kind: "features" or "distances".
    """
    names = list(dict.fromkeys(name for run in runs for name in getattr(run, kind)))
    common = [name for name in names if all(name in getattr(run, kind) for run in runs)]
    common = [name for name in common if len({weights_of(getattr(run, kind)[name]) for run in runs}) == 1]
    return common, [name for name in names if name not in common]


def weights_of(described: Mapping[str, Any]) -> str:
    """The hash of a network's weights, or where they are on the Hub; "": as published."""
    return str(described.get("sha256") or described.get("path") or "")


def _features(runs: Sequence[ScoredRun], name: str, places: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    return {run.name: features_of(run, name, places[run.name]) for run in runs}


def features_of(run: ScoredRun, name: str, places: Sequence[int]) -> np.ndarray:
    """Features of the images in some rows, float32 `[N, D]`; NaN where there are none."""
    column = run.table[f"{FEATURES}{name}"].take(pa.array(places, pa.int64())).combine_chunks()
    there = column.is_valid().to_numpy(zero_copy_only=False)
    found = np.full((len(column), column.type.list_size), np.nan, np.float32)
    found[there] = column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(there.sum(), -1)
    return found


def _distances(runs: Sequence[ScoredRun], name: str, places: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Distances of the pairs of images of a prompt among these places, whose order is that of prompts."""
    found = {}
    for run in runs:
        lists = run.table[f"{DISTANCE}{name}"].to_pylist()
        seen: collections.Counter[tuple] = collections.Counter()
        ranks = []  # of a row among those of its prompt
        for key in run.rows:
            ranks.append(seen[key[:2]])
            seen[key[:2]] += 1
        keys = list(run.rows)
        prompts = [keys[place][:2] for place in places[run.name]]
        clusters = np.cumsum([0, *(key != before for before, key in itertools.pairwise(prompts))])
        values = []
        for i, j in pairs_within(clusters).tolist():
            earlier, later = sorted((places[run.name][i], places[run.name][j]))
            value = (lists[later] or [])[ranks[earlier]] if len(lists[later] or []) > ranks[earlier] else None
            values.append(math.nan if value is None else value)
        found[run.name] = np.array(values, np.float64)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The report


def compare(
    runs: Sequence[ScoredRun],
    items: Items,
    baseline: str,
    votes: Sequence["Vote"] = (),
    reference: Reference | None = None,
) -> dict[str, Any]:
    """What report.json holds; without NaN.

    Args:
        runs: whose names are the methods.
        items: of `pair_runs`.
        baseline: a method.
        votes: of `read_votes`.
        reference: images that each method's are compared with.

    Returns:
        `overall`, `categories`, `benchmarks`, `diversity`, `sets`, `sweeps` and `votes` are lists of rows; `notes` are
        sentences that belong to `sets`, whose rows are of all images of a method, see `set_measures.set_rows`. An
        interval is {"value", "low", "high"}, the last two None where there is only one prompt. Comparisons with the
        baseline (`win_rate`, `gain`, `sign_test`, `difference`) are None in its own rows. Of a reward a pair counts if
        its scores are finite under all methods, so that all have the same pairs; `images` says how many have,
        `not_finite` how many scores of the method are not finite. `left_out` are all images of a run that are in no
        pair. `pairs_sha256` is the same for reports on the same prompts and seeds.

    Raises:
        ValueError: the scores of a reward are finite in no pair, or votes cannot be counted.
    """
    methods = list(items.files)
    overall = summaries(items, baseline)
    if absent := next((reward for reward in items.scores if reward not in {row["reward"] for row in overall}), None):
        worst = max(methods, key=lambda method: np.sum(~np.isfinite(items.scores[absent][method])))
        raise ValueError(f"{absent}: no pair has finite scores ({worst} has fewest); leave it out with --rewards")
    categories = []
    for column, values in items.categories.items():
        labels = np.array(values)
        rows = [
            {"column": column, "value": value, **row}
            for value in sorted(set(values) - {""}, key=natural)
            for row in summaries(items, baseline, labels == value)
        ]
        categories += corrected(rows)
    return {
        "baseline": baseline,
        "created": datetime.date.today().isoformat(),
        "rewards": list(items.scores),
        "weights": {name: runs[0].rewards.get(name, {}).get("sha256") or "" for name in items.scores},
        "pairs_sha256": items.sha256,
        "prompts": int(items.prompts[-1]) + 1,
        "pairs": len(items.prompt),
        "statistics": STATISTICS,
        "methods": [_described(run, len(items.prompt)) for run in runs],
        "overall": corrected(overall),
        "categories": categories,
        "benchmarks": _benchmarks(items, baseline),
        "diversity": _diversity(items, baseline),
        "reference": None if reference is None else reference.name,
        "sets": (sets := _sets(items, reference)),
        "notes": set_notes(sets, reference),
        "sweeps": _sweeps(runs, overall),
        "votes": _count_votes(votes, items, baseline),
        # Filled by what compares methods beyond this, see `run_report`.
        **{"controls": [], "control_runs": [], "verdicts": [], "looks": [], "trained_on": None, "standardised": []},
    }


def _described(run: ScoredRun, pairs: int) -> dict[str, Any]:
    problems = collections.Counter(run.problems.values())
    return {
        "name": run.name,
        "folder": run.folder,
        "settings": run.settings,
        "w": run.w,
        "cost": None if (cost := read_cost(run.folder)) is None else cost._asdict(),
        "images": len(run.rows),
        **{problem: problems[problem] for problem in PROBLEMS},
        "left_out": len(run.rows) - pairs,
    }


def summaries(items: Items, baseline: str, chosen: np.ndarray | None = None) -> list[dict[str, Any]]:
    """One row per reward and method, as `compare` has them in `overall`; none of a reward without finite pairs.

    Args:
        items: of `pair_runs`.
        baseline: a method.
        chosen: the pairs that count, bool `[N]`; None: all.
    """
    chosen = np.ones(len(items.prompt), bool) if chosen is None else chosen
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
    """`mean_intervals` of several tables; those with the same units are resampled together."""
    together = collections.defaultdict(list)
    for name in values:
        together[units[name]].append(name)
    intervals = {}
    for names in together.values():
        found = iter(mean_intervals(np.concatenate([values[name] for name in names], axis=1)))
        intervals |= {name: [next(found) for _ in range(values[name].shape[1])] for name in names}
    return intervals


def mean_intervals(values: np.ndarray) -> list[dict[str, float | None]]:
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


def corrected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


def _known(by: Mapping[str, np.ndarray]) -> np.ndarray:
    """Whether the features of a pair are there, finite and not 0 under all methods, bool `[N]`."""
    return np.all([np.isfinite(values).all(axis=1) & values.any(axis=1) for values in by.values()], axis=0)


def _sets(items: Items, reference: Reference | None) -> list[dict[str, Any]]:
    """Rows about all images of a method, by their features."""
    known = {name: _known(by) for name, by in items.features.items()}
    features = {
        name: {method: values[known[name]] for method, values in by.items()}
        for name, by in items.features.items()
        if known[name].any()
    }
    prompts = {name: np.unique(items.prompts[known[name]], return_inverse=True)[1] for name in features}
    return set_rows(features, prompts, reference)


def _diversity(items: Items, baseline: str) -> list[dict[str, Any]]:
    """How different the images of a prompt are, over prompts with several seeds: distances and Vendi scores."""
    rows = []
    for name, by in items.features.items():
        there = _known(by)
        there &= np.bincount(items.prompts[there], minlength=len(there))[items.prompts] > 1
        if there.any():
            prompts = items.prompts[there]
            rows += _diversity_rows(
                name, "distance", {m: pairwise_distances(values[there], prompts) for m, values in by.items()}, baseline
            )
            rows += _diversity_rows(
                name, VENDI, {m: _vendi_scores(values[there], prompts) for m, values in by.items()}, baseline
            )
            rows += _diversity_rows(
                name, ALIKE, {m: near_duplicates(values[there], prompts) for m, values in by.items()}, baseline
            )
    for name, by in items.distances.items():
        there = np.all([np.isfinite(values) for values in by.values()], axis=0)
        if there.any():
            prompts = items.prompts[items.pairs[there, 0]]
            means = {m: cluster_means(values[there, None], prompts)[:, 0] for m, values in by.items()}
            rows += _diversity_rows(name, "distance", means, baseline)
    return rows


def _vendi_scores(features: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Vendi scores of the images of each prompt, float64 `[prompts]`."""
    ends = np.flatnonzero(np.diff(prompts)) + 1
    return np.array([vendi_score(part) for part in np.split(features, ends)])


def _diversity_rows(
    features: str, measure: str, values: Mapping[str, np.ndarray], baseline: str
) -> list[dict[str, Any]]:
    """One row per method, of the values of each prompt `[prompts]`."""
    columns = np.stack(list(values.values()), 1)
    intervals = mean_intervals(np.concatenate([columns, columns - values[baseline][:, None]], axis=1))
    return [
        {
            "method": method,
            "features": features,
            "measure": measure,
            "prompts": len(columns),
            "value": intervals[place],
            "difference": None if method == baseline else intervals[len(values) + place],
        }
        for place, method in enumerate(values)
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
                    "win_rate": mean_intervals(by_prompt[:, :1])[0],
                    "sign_test": _signs(by_prompt[:, 1]),
                }
            )
    if votes and not rows:
        raise ValueError(
            f"none of the {len(votes)} votes is about an image compared here and the baseline {baseline}; expected the "
            "runs that were voted on"
        )
    return [row | row.pop("sign_test") for row in corrected(rows)]
