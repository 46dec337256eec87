"""Compares methods on the same prompts and seeds, from scored runs, and writes the report."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from flax_pref.config import UserError
from flax_pref.evaluation import comparison
from flax_pref.evaluation.comparison import (
    Items,
    ScoredRun,
    common_networks,
    common_rewards,
    pair_runs,
    read_run,
    read_votes,
)
from flax_pref.evaluation.fair import compare_with_controls, verdicts
from flax_pref.evaluation.figures import write_figures
from flax_pref.evaluation.hacking import standardised_gains
from flax_pref.evaluation.markdown import markdown_report
from flax_pref.evaluation.pages import write_pages
from flax_pref.evaluation.reference import read_reference
from flax_pref.evaluation.report_flags import ReportFlags
from flax_pref.evaluation.runs import PROBLEMS, several
from flax_pref.evaluation.tables import printed_tables, write_tables
from flax_pref.files import replacing
from flax_pref.rewards.appearance import MEASURES


def compare(
    runs: str | Path | Sequence[str | Path],
    *,
    baseline: str | None = None,
    rewards: str | Sequence[str] = (),
    reference: str | Path | None = None,
) -> dict[str, Any]:
    """Compares methods on the same prompts and seeds, from scored folders of images. Writes nothing.

    `report_runs` writes the report with its pages and tables.

    Args:
        runs: scored folders, see `score`; as FOLDER or NAME=FOLDER (default name: that of the folder).
        baseline: method, or its folder, that the others are compared with (default: the first).
        rewards: names of the rewards to compare (default: all that the runs have in common).
        reference: folder of images, scored with the same features, or statistics of Inception's (.npz), that the
            methods' images are compared with by FID and others (default: none).

    Returns:
        the report, see `evaluation.comparison.compare`: `overall` has a row for each reward and method, with mean,
        gain and win rate over the baseline and their 95 % bootstrap intervals over prompts; `diversity` and `sets` have
        rows about features, `notes` what must be known to read them.

    Raises:
        UserError, ValueError, OSError: the runs are not scored, or cannot be compared.

    Example:
        >>> scores = fp.score(["runs/base", "runs/cpgd"], "compressibility")
        >>> report = fp.compare(["runs/base", "runs/cpgd"])
        >>> report["baseline"], report["prompts"], [row["method"] for row in report["overall"]]
        ('base', 2, ['base', 'cpgd'])
    """
    folders = methods_of(several(runs))
    place = None if reference is None else str(reference)
    flags = ReportFlags(runs=tuple(folders), rewards=several(rewards), reference=place)
    return _compared(folders, baseline_of(baseline, folders), flags).report


class Compared(NamedTuple):
    """A report and what it is of.

    Attributes:
        report: what report.json holds.
        runs: the methods.
        items: their images and scores.
        dropped: rewards that are left out, as a run lacks them.
    """

    report: dict[str, Any]
    runs: list[ScoredRun]
    items: Items
    dropped: list[str]


def _compared(folders: Mapping[str, str], baseline: str, flags: ReportFlags) -> Compared:
    """Compares scored folders."""
    runs = [read_run(folder, name) for name, folder in folders.items()]
    rewards, dropped = common_rewards(runs, flags.rewards)
    reference = None if flags.reference is None else read_reference(flags.reference, runs)
    everything = pair_runs(runs, rewards)
    # How images look is no quality: it stands apart, and corrects the p of no reward.
    looks = {name: by for name, by in everything.scores.items() if name in MEASURES}
    items = dataclasses.replace(everything, scores={n: by for n, by in everything.scores.items() if n not in looks})
    report = comparison.compare(runs, items, baseline, read_votes(flags.votes), reference)
    report["looks"] = comparison.summaries(dataclasses.replace(everything, scores=looks), baseline)
    report["control_runs"] = list(flags.controls)
    report["controls"] = compare_with_controls(items, baseline, flags.controls)
    report["verdicts"] = verdicts(report)
    report["trained_on"] = flags.trained_on
    if flags.trained_on is not None and flags.trained_on not in items.scores:
        told = ", ".join(items.scores) or "none"
        raise UserError(f"--trained-on {flags.trained_on}: is none of the rewards compared; expected one of {told}")
    report["standardised"] = standardised_gains(items, baseline, report["rewards"] if flags.trained_on else ())
    return Compared(report, runs, items, dropped)


def report_runs(flags: ReportFlags) -> Path:
    """Compares scored runs, prints the tables and writes the report, which replaces an earlier one.

    The folder gets report.html (the comparison, with the images side by side), vote.html (a blind vote on the same
    images), report.json, report.md (for a model card), table.csv, categories.csv, features.csv, table.tex, and figures
    as SVG. Every mean over prompts has a 95 % bootstrap interval over prompts; several seeds of a prompt are averaged
    first.

    Returns:
        the folder.

    Raises:
        UserError, ValueError, OSError: the runs cannot be compared, or the folder cannot be written.
    """
    folders = methods_of(flags.runs)
    baseline = baseline_of(flags.baseline, folders)
    out = _out_of(flags.out, folders)
    _check_controls(flags, folders, baseline)
    report, runs, items, dropped = _compared(folders, baseline, flags)
    print(_summary(report, runs, items, dropped))
    title = flags.title or " / ".join(folders)
    write_tables(report, out)
    write_figures(report, out / "figures")
    with replacing(out / "report.md") as unfinished:
        unfinished.write_text(markdown_report(report, title), encoding="utf-8")
    write_pages(out, report, items, images=flags.images, title=title)
    with replacing(out / "report.json") as unfinished:  # last: who finds it finds everything
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
        unfinished.write_text(f"{text}\n", encoding="utf-8")
    return out


def methods_of(runs: Sequence[str]) -> dict[str, str]:
    """Folders by the names of their methods; a name that two folders have is preceded by the folder above."""
    if not runs:
        raise UserError("no runs; expected scored folders, e.g. runs/base runs/cpgd")
    named = [_split(run) for run in runs]
    places = {}
    for (_, folder), run in zip(named, runs, strict=True):
        place = str(epath.Path(folder).resolve())
        if place in places:
            raise UserError(f"{run}: is the same folder as {places[place]}; expected each run once")
        places[place] = run
    unnamed = [epath.Path(place).parts for (name, _), place in zip(named, places, strict=True) if not name]
    names = [
        name or _shortest(epath.Path(place).parts, unnamed) for (name, _), place in zip(named, places, strict=True)
    ]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two runs are called {twice}; expected different names, e.g. {twice}-2=FOLDER")
    return dict(zip(names, (folder for _, folder in named), strict=True))


def _split(run: str) -> tuple[str, str]:
    """Name, "" if there is none, and folder; a folder may have an equals sign in its own name."""
    name, equals, folder = run.partition("=")
    if not equals or epath.Path(run).exists():
        return "", run
    if not name.strip() or not folder:
        raise UserError(f"{run}: expected NAME=FOLDER")
    return name.strip(), folder


def _shortest(own: Sequence[str], all_parts: Sequence[Sequence[str]]) -> str:
    """The last parts of a path, as few as no other path ends in."""
    counts = (sum(parts[-n:] == own[-n:] for parts in all_parts) for n in range(1, len(own)))
    return "/".join(own[-next((n for n, count in enumerate(counts, 1) if count == 1), len(own)) :])


def baseline_of(baseline: str | None, folders: dict[str, str]) -> str:
    """The method that is meant by its name or folder."""
    if baseline is None or baseline in folders:
        return baseline or next(iter(folders))
    wanted = epath.Path(baseline).resolve()
    meant = [name for name, folder in folders.items() if epath.Path(folder).resolve() == wanted]
    if not meant:
        raise UserError(f"--baseline {baseline}: no such method; expected one of {', '.join(folders)}")
    return meant[0]


def _check_controls(flags: ReportFlags, folders: Mapping[str, str], baseline: str) -> None:
    for name in flags.controls:
        if name not in folders:
            raise UserError(f"--controls {name}: no such run; expected names of {', '.join(folders)}")
        if name == baseline:
            raise UserError(f"--controls {name}: is the baseline, which methods are compared with anyway")
    if flags.controls and not set(folders) - {baseline, *flags.controls}:
        raise UserError("--controls: no run is left that is compared with them; expected one or more of methods")


def _out_of(out: str, folders: dict[str, str]) -> Path:
    """The folder of the report, which is that of no run."""
    if "://" in out:
        raise UserError(f"--out {out}: expected a local folder; copy the report from there")
    path = Path(out)
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"--out {out}: {there} is a file; expected a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"--out {out}: cannot write into {there}; choose another folder")
    if mixed := next((folder for folder in folders.values() if Path(folder).resolve() == path.resolve()), None):
        raise UserError(f"--out {out}: is the folder of the run {mixed}; expected one for the report alone")
    return path


def _summary(report: dict[str, Any], runs: Sequence[ScoredRun], items: Items, dropped: Sequence[str]) -> str:
    """What the terminal shows: the tables, below what they are about and what has been left out."""
    lines = [
        f"{report['pairs']:,} pairs (prompt, seed) of {report['prompts']:,} prompts; baseline {report['baseline']}; "
        "95 % intervals; p of the sign test, corrected (Holm)"
    ]
    for method in report["methods"]:
        if method["left_out"]:
            reasons = {name: method[name] for name in PROBLEMS}
            reasons["without a counterpart in another run"] = method["left_out"] - sum(reasons.values())
            told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
            lines.append(f"{method['name']}: {method['left_out']:,} of {method['images']:,} images left out ({told})")
    for reward in dropped:
        lacking = [run.name for run in runs if reward not in run.rewards]
        lines.append(f"{reward}: left out, {', '.join(lacking)} not scored by it")
    for reward in report["rewards"]:
        cells = [row for row in report["overall"] if row["reward"] == reward]
        if left_out := report["pairs"] - cells[0]["images"]:
            told = ", ".join(f"{row['method']} {row['not_finite']:,}" for row in cells if row["not_finite"])
            lines.append(f"{reward}: {left_out:,} pairs left out, scores that are not finite: {told}")
    for kind in ("features", "distances"):
        for name in common_networks(runs, kind)[1]:
            lacking = [run.name for run in runs if name not in getattr(run, kind)]
            reason = f"{', '.join(lacking)} without them" if lacking else "their weights differ between runs"
            lines.append(f"{kind} of {name}: left out, {reason}")
    for name in items.features:
        used = next((row["images"] for row in report["sets"] if row["features"] == name), 0)
        if used < report["pairs"]:
            lines.append(f"features of {name}: {report['pairs'] - used:,} pairs left out, not there or not finite")
    lines += report["notes"]
    return "\n".join([*lines, "", printed_tables(report)])
