"""Several reports as one page: a row for each method, a column for each reward, with intervals and filters.

Scores of different prompts are not comparable, so the page shows one set of pairs of prompt and seed at a time.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_pref.config import UserError
from flax_pref.evaluation.leaderboard_flags import LeaderboardFlags
from flax_pref.evaluation.pages import page_of
from flax_pref.evaluation.run_report import methods_of
from flax_pref.files import read_json, replacing
from flax_pref.programs import title as title_of

REPORT = "report.json"
MEASURES = ("mean", "gain", "win_rate")


def merge_reports(flags: LeaderboardFlags) -> Path:
    """Writes leaderboard.html and leaderboard.json, which replace earlier ones.

    Returns:
        the folder.

    Raises:
        UserError, OSError: a report cannot be read, or the folder cannot be written.
    """
    reports = {name: _read(folder) for name, folder in methods_of(flags.reports).items()}
    board, out = leaderboard_of(reports), Path(flags.out)
    if (out / REPORT).exists():
        raise UserError(f"--out {out}: is the folder of a report; expected one for the leaderboard alone")
    with replacing(out / "leaderboard.html") as unfinished:
        page = page_of("leaderboard", flags.title, {"data": board}, board=board)
        unfinished.write_text(page, encoding="utf-8", newline="\n")
    with replacing(out / "leaderboard.json") as unfinished:
        text = json.dumps(board, indent=2, ensure_ascii=False, allow_nan=False)
        unfinished.write_text(f"{text}\n", encoding="utf-8")
    return out


def leaderboard_of(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The rows and columns of the page.

    Args:
        reports: report.json of each, by name.

    Returns:
        `sets`: of pairs of prompt and seed, with the number of prompts and pairs. `rewards`: the columns; a name whose
        weights differ between reports has their hash behind it. `rows`: a method of a report, with its set, baseline,
        cost and `cells`, an interval for each measure and reward. A method of the same name with the same figures, such
        as a baseline that several reports share, has one row.
    """
    keys = {name: report.get("pairs_sha256") or name for name, report in reports.items()}
    sets = {
        keys[name]: {"prompts": report["prompts"], "pairs": report["pairs"], "reports": []}
        for name, report in reports.items()
    }
    hashes: dict[str, set[str]] = {}
    for report in reports.values():
        for reward in report["rewards"]:
            hashes.setdefault(reward, set()).add(_weights(report, reward))
    columns, rows, seen = [], [], set()
    for name, report in reports.items():
        sets[keys[name]]["reports"].append(name)
        for method in report["methods"]:
            cells = {}
            for row in report["overall"]:
                if row["method"] == method["name"]:
                    reward, sha256 = row["reward"], _weights(report, row["reward"])
                    column = reward if len(hashes[reward]) == 1 else f"{reward} ({sha256[:8] or 'published'})"
                    columns.append(column)
                    cells[column] = {measure: row[measure] for measure in MEASURES}
            row = {
                "report": name,
                "set": list(sets).index(keys[name]),
                "method": method["name"],
                "baseline": report["baseline"],
                "control": method["name"] in report.get("control_runs", []),
                "w": method["w"],
                **{key: (method.get("cost") or {}).get(key) for key in ("predictions", "seconds")},
                "cells": cells,
            }
            same = json.dumps({key: value for key, value in row.items() if key != "report"}, sort_keys=True)
            if same not in seen:
                rows.append(row)
                seen.add(same)
    return {"sets": list(sets.values()), "rewards": list(dict.fromkeys(columns)), "rows": rows}


def _weights(report: Mapping[str, Any], reward: str) -> str:
    return report.get("weights", {}).get(reward) or ""


def _read(folder: str) -> dict[str, Any]:
    """A report; that it has what the page needs."""
    file = Path(folder) / REPORT
    expected = f"a folder that {title_of('report')} has written"
    report = read_json(file, expected=expected)
    try:
        json.dumps(leaderboard_of({folder: report}), allow_nan=False)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: not a report ({type(error).__name__}: {error}); expected {expected}") from error
    return report
