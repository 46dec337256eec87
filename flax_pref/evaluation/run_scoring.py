"""Scores finished folders of images, or the pairs of prepared sets, with rewards, in one process or several.

Each folder of images gets `scores.parquet`: a row per image with a column for each reward, to which later calls add. A
prepared set gets a file for each reward, see `pair_scoring`.
"""

import contextlib
import hashlib
import json
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from flax_pref.checkpoints.hub import HUB_ID
from flax_pref.checkpoints.modules import PICKLED, SAFE, fingerprint
from flax_pref.config import UserError, check_file_systems
from flax_pref.data.prompts import Prompt, read_prompts
from flax_pref.evaluation.benchmark_scoring import NamedBenchmark, answer, named_benchmarks, told
from flax_pref.evaluation.pair_scoring import is_prepared_set, score_set
from flax_pref.evaluation.runs import DISTANCE, FEATURES, PROBLEMS, SCORE, open_run, several
from flax_pref.evaluation.score_flags import ScoreFlags
from flax_pref.evaluation.scoring import Scorer, Scores, locked, score_images
from flax_pref.files import difference
from flax_pref.parallel.agreement import Content, Fact, agree, begin_together, flat
from flax_pref.parallel.hosts import join, watched
from flax_pref.parallel.mesh import TRAINING_AXES, make_mesh
from flax_pref.parallel.pieces import in_pieces
from flax_pref.parallel.signals import stopped_by
from flax_pref.programs import title
from flax_pref.rewards.clip import RESIZED
from flax_pref.rewards.features import DISTANCES, PATH_NEEDED, load_distance, load_features
from flax_pref.rewards.features import FEATURES as NETWORKS
from flax_pref.rewards.remote import is_service
from flax_pref.rewards.reward import REWARDS, load_reward

# What may differ between hosts: where inputs lie, of which the content is compared.
FREE_OF_HOSTS = ("hosts", "rewards", "features", "clip", "prompts", "source")


def score(
    runs: str | Path | Sequence[str | Path],
    rewards: str | Sequence[str] = (),
    *,
    features: str | Sequence[str] = (),
    benchmarks: str | Sequence[str] = (),
    prompts: str | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, np.ndarray]]:
    """Scores folders of images, or the pairs of prepared sets, and stores the scores in the folders.

    Scores only what is not scored yet. Prints what it loads and the means. `score_runs` takes every other setting.

    Args:
        runs: one or several folders of images, as `sample.images` writes them, or any others with prompts; or prepared
            sets, whose images are read from their source.
        rewards: one or several, each a name such as "pickscore" with its published weights, NAME=PATH with a file,
            folder or Hub id of the weights, NAME=http://..., or NAME=python:MODULE:FUNCTION.
        features: one or several networks whose features of the images are stored for reports, each a name such as
            "clip" or NAME=PATH, see `rewards.features.FEATURES`; or lpips=PATH.
        benchmarks: one or several, each a name ("geneval", "geneval2", "dpg", "t2i_compbench"), NAME=FILE with what the
            benchmark's own program has written, or NAME=http://...; see docs/evaluation_sets.md. Prints the published
            scores.
        prompts: file or folder with the prompts of images that are not from `sample.images` (default: beside or in the
            images).
        batch_size: images per device and batch.

    Returns:
        scores by folder and reward or benchmark, float32 `[N]` in the order of scores.parquet, without images that are
        missing or damaged; of prepared sets float32 `[N, 2]`, of winner and loser of each pair. NaN or infinite where
        the reward is, NaN where a benchmark leaves an image out.

    Raises:
        UserError, ValueError, OSError: a folder or a reward cannot be read, or not be scored.

    Example:
        >>> scores = fp.score(["runs/base", "runs/cpgd"], "compressibility")
        >>> scores["runs/base"]["compressibility"].shape
        (2,)
    """
    flags = ScoreFlags(
        runs=several(runs),
        rewards=several(rewards),
        features=several(features),
        benchmarks=several(benchmarks),
        prompts=prompts,
        batch_size=batch_size,
    )
    return score_runs(flags)


def score_runs(flags: ScoreFlags) -> dict[str, dict[str, np.ndarray]]:
    """Scores what is not scored yet, and prints the means.

    Run again with the same flags after a kill, it resumes. SIGTERM stops it after the current batch.

    Returns:
        scores of the folders of this process, see `score`.

    Raises:
        UserError, ValueError, OSError: what the flags ask for cannot be had.
    """
    process, processes = join(flags.hosts)
    with watched():
        return score_part(flags, process, processes)


def score_part(flags: ScoreFlags, process: int, processes: int) -> dict[str, dict[str, np.ndarray]]:
    """Scores the part of one of several processes, or all of it; see `score_runs`.

    A process scores every `processes`-th folder of images, or every `processes`-th shard of each prepared set.
    """
    begin_together(flags, FREE_OF_HOSTS)
    work = resolve_scoring(flags)
    agree(lambda: _contents_of(work))
    return _score_sets(work, process, processes) if work.prepared else _score_folders(work, process, processes)


def _score_sets(work: "ScoringWork", process: int, processes: int) -> dict[str, dict[str, np.ndarray]]:
    columns, found = {one.name: one for one in work.columns}, {}
    with stopped_by(signal.SIGTERM) as stop:
        for folder in work.folders:
            found[folder] = score_set(
                *(folder, {name: one.of for name, one in columns.items()}, lambda name: _scorer(columns[name], work)),
                **{"source": work.flags.source, "process": process, "processes": processes, "stop": stop},
            )
            if stop():
                break
    return found


def _score_folders(work: "ScoringWork", process: int, processes: int) -> dict[str, dict[str, np.ndarray]]:
    folders = work.folders[process::processes]
    if not folders:
        print(f"process {process} of {processes}: fewer folders than processes, none is left for this one")
        return {}
    with contextlib.ExitStack() as held, stopped_by(signal.SIGTERM) as stop:
        tables, runs = [], []
        for folder in folders:
            run = open_run(folder, work.prompts, needed=any(one.column.startswith(SCORE) for one in work.columns))
            if run.told:
                print(f"{folder}: no manifest; {len(run.rows)} images, {run.told}")
            held.enter_context(locked(run.folder))
            runs.append(run)
            tables.append(Scores(run))
            tables[-1].look_again()
        for asked in work.benchmarks:  # first: most are files, and quick
            for run, scores in zip(runs, tables, strict=True):
                if not stop():
                    answer(asked, run, scores, batch_size=work.flags.batch_size, stop=stop)
        if work.columns and not any(
            len(scores.pending(one.column, one.of)) for scores in tables for one in work.columns
        ):
            print("all images that can be scored are; nothing to do")
        for one in work.columns:
            if not stop():
                _score_column(tables, one, work, stop)
        for run, scores in zip(runs, tables, strict=True):
            scores.save()  # perhaps a problem is gone
            print("\n".join(_summary(scores, work.columns)))
            for asked in work.benchmarks:
                print("\n".join(told(asked, run, scores)))
    named = {one.name: one.column for one in work.columns if one.column.startswith(SCORE)}
    named |= {asked.benchmark.name: SCORE + asked.benchmark.name for asked in work.benchmarks}
    return {
        folder: {name: scores.scores(column) for name, column in named.items()}
        for folder, scores in zip(folders, tables, strict=True)
    }


# ----------------------------------------------------------------------------------------------------------------------
# From flags to parts


class ScoreColumn(NamedTuple):
    """A column to be computed.

    Attributes:
        column: of the table.
        name: of the reward.
        path: of its weights, or None.
        tokenizer: of the reward, or None.
        of: what its values depend on; see `Scores.begin`.
    """

    column: str
    name: str
    path: str | None
    tokenizer: str | None
    of: dict[str, Any]


class ScoringWork(NamedTuple):
    """What `ScoreFlags` ask for, found and checked; see `resolve_scoring`.

    Attributes:
        flags: that were resolved.
        columns: to be computed.
        folders: of images, each once.
        prompts: of foreign images; None: they are with the images.
        prepared: the folders are prepared sets.
        benchmarks: to be answered.
    """

    flags: ScoreFlags
    columns: Sequence[ScoreColumn]
    folders: Sequence[str]
    prompts: Sequence[Prompt] | None
    prepared: bool = False
    benchmarks: Sequence[NamedBenchmark] = ()


def resolve_scoring(flags: ScoreFlags) -> ScoringWork:
    """Finds what the flags name and checks that it fits together; reads weights for their hash only.

    Raises:
        UserError, ValueError, FileNotFoundError: a reward is not known, is there twice or has no such file, a folder or
            prompts are missing, or these devices cannot be used so.
    """
    rewards = _rewards(flags)
    tokenizers = _tokenizers(flags, [name for _, name, _ in rewards])
    if flags.clip is not None and "aesthetic" not in [name for _, name, _ in rewards]:
        raise UserError(f"--clip {flags.clip}: is of aesthetic, which is not asked for; leave it out")
    if flags.clip is not None:
        _check_place("--clip", flags.clip, flags.clip)
    check_file_systems(*flags.runs, flags.prompts)
    make_mesh(flags.mesh, jax.local_devices(), TRAINING_AXES)
    if missing := [folder for folder in flags.runs if not epath.Path(folder).is_dir()]:
        raise UserError(
            f"{missing[0]}: no such folder; expected a finished one of {title('sample')}, or one with images"
        )
    prepared = _are_prepared(flags)
    prompts = None if flags.prompts is None else read_prompts(flags.prompts, column=flags.column)
    columns = [
        ScoreColumn(column, name, path, tokenizers.get(name, tokenizers.get("")), identity(name, path, flags))
        for column, name, path in rewards
    ]
    folders = list(dict.fromkeys(str(epath.Path(run)) for run in flags.runs))
    benchmarks = named_benchmarks(flags.benchmarks, folders)
    if twice := {one.benchmark.name for one in benchmarks} & {name for _, name, _ in rewards}:
        raise UserError(f"--rewards and --benchmarks: {twice.pop()} is in both; give the reward another name")
    return ScoringWork(flags, columns, folders, prompts, prepared, benchmarks)


def _are_prepared(flags: ScoreFlags) -> bool:
    """Whether the folders are prepared sets; none of them is or all are, and the flags fit."""
    sets = [folder for folder in flags.runs if is_prepared_set(folder)]
    others = [folder for folder in flags.runs if folder not in sets]
    if sets and others:
        raise UserError(f"{sets[0]} is a prepared set, and {others[0]} is not; score them in two calls")
    given = {"--features": " ".join(flags.features) or None, "--prompts": flags.prompts}
    given["--benchmarks"] = " ".join(flags.benchmarks) or None
    if sets and (unfit := [flag for flag, value in given.items() if value is not None]):
        raise UserError(f"{unfit[0]} {given[unfit[0]]}: is for folders of images, and {sets[0]} is a prepared set")
    if others and flags.source is not None:
        raise UserError(f"--source {flags.source}: is for a prepared set, and {others[0]} is none; leave it out")
    if flags.source is not None and len(sets) > 1:
        raise UserError(f"--source {flags.source}: is of one prepared set; score {sets[0]} and others in a call each")
    return bool(sets)


def _rewards(flags: ScoreFlags) -> list[tuple[str, str, str | None]]:
    """Column, name and path of each reward and network that the flags name."""
    if not (flags.rewards or flags.features or flags.benchmarks):
        raise UserError(f"nothing to score with; expected --rewards with one or more of {', '.join(REWARDS)}")
    found: dict[str, tuple[str, str, str | None]] = {}
    for text in flags.rewards:
        name, path = named_reward(text)
        found.update(_once(found, "--rewards", SCORE + name, name, path))
    for text in flags.features:
        name, path = named_network(text)
        found.update(_once(found, "--features", (DISTANCE if name in DISTANCES else FEATURES) + name, name, path))
    return list(found.values())


def _once(found: Mapping[str, Any], flag: str, column: str, name: str, path: str | None) -> dict[str, tuple]:
    if column in found:
        raise UserError(f"{flag}: {name} is there twice; expected each once, under a name of its own")
    return {column: (column, name, path)}


def named_network(text: str) -> tuple[str, str | None]:
    """Name and path of a network that `--features` gives as NAME or NAME=PATH.

    Raises:
        UserError: it is neither, there is no such network, or nothing lies at the path.
    """
    name, given, path = text.partition("=")
    if given and not path:
        raise UserError(f"--features {text}: expected NAME or NAME=PATH")
    known = (*NETWORKS, *DISTANCES)
    if name not in known:
        raise UserError(f"--features {text}: no network {name!r} for features; expected one of {', '.join(known)}")
    if path:
        _check_place("--features", text, path)
    elif name in PATH_NEEDED:
        raise UserError(f"--features {text}: needs the path of its weights, {name}=PATH; {PATH_NEEDED[name]}")
    return name, path or None


def named_reward(text: str, flag: str = "--rewards") -> tuple[str, str | None]:
    """Name and path of a reward that a flag gives as NAME or NAME=PATH.

    Raises:
        UserError: it is neither, there is no such reward, or nothing lies at the path.
    """
    name, given, path = text.partition("=")
    if not re.fullmatch(r"[\w.+-]+", name) or (given and not path):
        raise UserError(f"{flag} {text}: expected NAME or NAME=PATH")
    if name not in REWARDS and not is_service(path):
        raise UserError(f"{flag} {text}: no reward {name!r}; expected one of {', '.join(REWARDS)}")
    if path and not is_service(path):
        _check_place(flag, text, path)
    return name, path or None


def _tokenizers(flags: ScoreFlags, names: Sequence[str]) -> dict[str, str]:
    """Folders of tokenizers by the names of rewards; one for all has the name ""."""
    tokenizers = {}
    for text in flags.tokenizer:
        name, separator, path = text.partition("=")
        if separator and name not in names:
            expected = ", ".join(dict.fromkeys(names))
            raise UserError(f"--tokenizer {text}: no reward {name!r} is asked for; expected of {expected}")
        path = path if separator else text
        _check_place("--tokenizer", text, path)
        tokenizers[name if separator else ""] = path
    return tokenizers


def _check_place(flag: str, text: str, path: str) -> None:
    if not Path(path).expanduser().exists() and not HUB_ID.fullmatch(path):
        raise UserError(f"{flag} {text}: no file or folder {path}; correct the path, or leave it out")


def identity(name: str, path: str | None, flags: ScoreFlags) -> dict[str, Any]:
    """What tells scores of a reward from those of another one under the same name."""
    of = {"name": name, "path": path, "sha256": "", "dtype": flags.dtype}
    of |= {"resized": RESIZED[name]} if name in RESIZED and not is_service(path) else {}
    if path is not None and not is_service(path) and (local := Path(path).expanduser()).exists():
        of |= {"path": local.resolve().name, "sha256": fingerprint(local.resolve(), SAFE + PICKLED)}
    if name == "aesthetic" and flags.clip is not None:
        local = Path(flags.clip).expanduser()
        of |= (
            {"clip": local.name, "clip_sha256": fingerprint(local.resolve(), SAFE + PICKLED)}
            if local.exists()
            else {"clip": flags.clip}
        )
    return of


def _contents_of(work: ScoringWork) -> dict[str, Fact]:
    """What the inputs hold, wherever they lie."""
    columns = {_label(one): one.of for one in work.columns}
    texts = hashlib.sha256(json.dumps([(prompt.id, prompt.text) for prompt in work.prompts or ()]).encode()).hexdigest()
    prompts = Content(work.flags.prompts or "none", texts)
    return flat({"rewards": ", ".join(columns), "prompts": prompts, **columns})


def _label(wanted: ScoreColumn) -> str:
    """A column's name in messages."""
    return f"features by {wanted.name}" if wanted.column.startswith(FEATURES) else wanted.name


# ----------------------------------------------------------------------------------------------------------------------
# Scoring


def _score_column(tables: Sequence[Scores], wanted: ScoreColumn, work: ScoringWork, stop: Callable[[], bool]) -> None:
    """Scores with one reward what is pending in all folders."""
    tables = [scores for scores in tables if len(scores.pending(wanted.column, wanted.of))]
    if not tables:
        return
    scorer = _scorer(wanted, work)
    bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    for scores in tables:
        before = scores.of(wanted.column)
        if before not in (None, wanted.of):
            print(f"{scores.folder}: {_label(wanted)} is computed again: was {difference(before, wanted.of)}")
        total = len(scores.pending(wanted.column, wanted.of))
        text, unit = (
            f"{scores.folder.name}: {_label(wanted)}",
            "pair" if wanted.column.startswith(DISTANCE) else "image",
        )
        with tqdm(desc=text, unit=unit, total=total, bar_format=bar_format) as progress:
            score_images(scorer, scores, wanted.column, wanted.of, stop=stop, done=progress.update)
        if stop():
            return


def _scorer(wanted: ScoreColumn, work: ScoringWork) -> Scorer:
    """Loads a reward onto the devices."""
    devices = jax.local_devices()
    print(f"loading {wanted.name} on {len(devices)} x {devices[0].device_kind} in {wanted.of['dtype']}")
    mesh, dtype = make_mesh(work.flags.mesh, devices, TRAINING_AXES), jnp.dtype(wanted.of["dtype"])
    beside = {"clip": work.flags.clip, "tokenizer": wanted.tokenizer}
    if wanted.column.startswith(DISTANCE):
        reward = load_distance(wanted.name, wanted.path, dtype=dtype)
    elif wanted.column.startswith(FEATURES):
        reward = load_features(wanted.name, wanted.path, **beside, dtype=dtype)
    else:
        reward = load_reward(wanted.name, wanted.path, **beside, dtype=dtype, place=in_pieces(mesh))
    return Scorer(reward, mesh, batch_size=work.flags.batch_size, column=wanted.column)


def _summary(scores: Scores, wanted: Sequence[ScoreColumn]) -> list[str]:
    """What there is to tell about a folder, line by line."""
    total = len(scores.images)
    lines = [f"{scores.folder}: {total} images, scores in {scores.file}"]
    for one in wanted:
        left = len(scores.pending(one.column, one.of))
        known = scores.scores(one.column) if scores.of(one.column) == one.of else np.zeros(0, np.float32)
        finite = np.isfinite(known).all(axis=tuple(range(1, known.ndim)))
        units = "pairs" if one.column.startswith(DISTANCE) else "images"
        parts = [f"{len(known)} {units}"] if scores.units(one.column) else ["no prompt has two images"]
        if len(known) and not one.column.startswith(FEATURES):
            mean = known[finite].mean(dtype=np.float64) if finite.any() else None
            parts = [] if mean is None else [f"mean {mean:.6g} of {finite.sum()} {units}"]
        parts += [f"{(~finite).sum()} not finite"] if not finite.all() else []
        parts += [f"stopped with {left} left; the same command resumes there"] if left else []
        lines.append(f"  {_label(one)}: {', '.join(parts)}")
    for problem in PROBLEMS:
        images = [scores.images[i] for i in np.flatnonzero(scores.problems == problem)]
        if images:
            shown = [f"{image.file} at {image.offset}" if image.offset else image.file for image in images[:3]]
            more = ", ..." if len(images) > 3 else ""
            lines.append(f"  {len(images)} {problem}, not scored: {', '.join(shown)}{more}")
    return lines
