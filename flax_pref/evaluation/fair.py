"""Methods beside controls: what the base model gains without preferences by spending as much.

A control is a run of the base model alone: at a guidance scale tuned on other prompts, with more steps, or the best of
several images by a reward. The comparison is paired as every other one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flax_pref.evaluation.comparison import Items, corrected, summaries
from flax_pref.evaluation.tables import decimals, with_interval


def compare_with_controls(items: Items, baseline: str, controls: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each reward, method and control.

    Args:
        items: of all runs.
        baseline: a method, which is no control.
        controls: names of runs.

    Returns:
        rows as `comparison.compare` has them in `overall`, with "control": `win_rate`, `gain` and `sign_test` are over
        the control. p is corrected for all these rows.
    """
    methods = [name for name in items.files if name != baseline and name not in controls]
    rows = [
        {"control": control, **row}
        for control in controls
        for row in summaries(items, control)
        if row["method"] in methods
    ]
    return corrected(rows)


def verdicts(report: Mapping[str, Any]) -> list[str]:
    """One sentence for each reward and method: which controls it is above, and which not, by their intervals."""
    lines = []
    for reward in report["rewards"]:
        rows = [row for row in report["controls"] if row["reward"] == reward]
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            places = decimals(row["gain"] for row in own)
            told = {"above": [], "below": [], "not told apart from": []}
            for row in own:
                low, high = row["gain"]["low"], row["gain"]["high"]
                kind = "above" if low is not None and low > 0 else "below" if high is not None and high < 0 else None
                gain = " ".join(with_interval(row["gain"], places, "+")).strip()
                told[kind or "not told apart from"].append(f"{row['control']} ({gain})")
            parts = [f"{kind} {', '.join(names)}" for kind, names in told.items() if names]
            lines.append(f"{reward}: {method} is {'; '.join(parts)}")
    return lines
