"""Figures of a report as SVG, for papers and cards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flax_pref.files import replacing

COLOURS = ("#2563ae", "#c46a0c", "#2a8f5d", "#8548ad", "#bd3d4c", "#127e8c", "#7a6414")  # as on the page
GREY = "#74747f"
# The same figure is the same file: names of parts come from this, and there is no date.
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "flax_pref",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
}


def write_figures(report: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Writes gains.svg, curves.svg (runs that differ in w) and hacking.svg, each where the report has what it shows.

    Returns:
        the files; each appears under its name when it is complete.
    """
    drawn = {"gains": _gains(report), "curves": _curves(report), "hacking": _hacking(report)}
    written = []
    for name, figure in drawn.items():
        if figure is not None:
            file = Path(folder) / f"{name}.svg"
            with replacing(file) as unfinished, matplotlib.rc_context(SETTINGS):
                figure.savefig(unfinished, format="svg", metadata={"Date": None}, bbox_inches="tight")
            written.append(file)
    return written


def _plain(text: str) -> str:
    """A text that matplotlib shows as it is."""
    return text.replace("$", r"\$")


def _axes(count: int, height: float, title: str) -> tuple[Figure, Sequence[Axes]]:
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(3.4 * count, height), layout="constrained")
        axes = figure.subplots(1, count, squeeze=False)[0]
        figure.suptitle(_plain(title), fontsize=9, color=GREY)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _errors(intervals: Sequence[Mapping[str, float | None]]) -> list[list[float]]:
    """How far the ends are from the values, as matplotlib wants it; 0 where there is no interval."""
    values = [(i["value"] or 0.0, i["low"], i["high"]) for i in intervals]
    below = [0.0 if low is None else value - low for value, low, _ in values]
    return [below, [0.0 if high is None else high - value for value, _, high in values]]


def _gains(report: Mapping[str, Any]) -> Figure | None:
    """Gains over the baseline by each reward, a row for each method."""
    rows = [row for row in report["overall"] if row["gain"]]
    if not rows:
        return None
    methods = list(dict.fromkeys(row["method"] for row in rows))
    title = f"gain over {report['baseline']}, 95 % intervals over {report['prompts']:,} prompts"
    figure, axes = _axes(len(report["rewards"]), 0.7 + 0.3 * len(methods), title)
    for place, (axis, reward) in enumerate(zip(axes, report["rewards"], strict=True)):
        own = {row["method"]: row["gain"] for row in rows if row["reward"] == reward}
        for y, method in enumerate(methods):
            gain = own[method]
            style = {"fmt": "o", "markersize": 4, "color": COLOURS[y % len(COLOURS)]}
            axis.errorbar([gain["value"]], [y], xerr=_errors([gain]), **style)
        axis.axvline(0, color=GREY, linestyle=":", linewidth=1)
        axis.set_yticks(range(len(methods)), [_plain(m) for m in methods] if place == 0 else [""] * len(methods))
        axis.invert_yaxis()
        axis.set_xlabel(_plain(reward))
    return figure


def _curves(report: Mapping[str, Any]) -> Figure | None:
    """Mean by w of runs that differ in nothing else."""
    if not report["sweeps"]:
        return None
    rewards = list(dict.fromkeys(sweep["reward"] for sweep in report["sweeps"]))
    families = list(dict.fromkeys(sweep["family"] for sweep in report["sweeps"]))
    figure, axes = _axes(len(rewards), 2.6, f"mean of {report['prompts']:,} prompts by w, 95 % intervals")
    for axis, reward in zip(axes, rewards, strict=True):
        for sweep in report["sweeps"]:
            if sweep["reward"] == reward:
                points = sweep["points"]
                means = [point["mean"] for point in points]
                axis.errorbar(
                    [point["w"] for point in points],
                    [mean["value"] for mean in means],
                    yerr=_errors(means),
                    fmt="o-",
                    markersize=3.5,
                    color=COLOURS[families.index(sweep["family"]) % len(COLOURS)],
                    label=_plain(sweep["family"]),
                )
        axis.set_xlabel("w")
        axis.set_ylabel(_plain(reward))
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _hacking(report: Mapping[str, Any]) -> Figure | None:
    """Gain by the reward that was trained on against the gain by each other one."""
    trained = report.get("trained_on")
    if not trained:
        return None
    gains = {(row["reward"], row["method"]): row["gain"] for row in report["standardised"]}
    others = [reward for reward in report["rewards"] if reward != trained and any(r == reward for r, _ in gains)]
    methods = [method for reward, method in gains if reward == trained]
    if not others or not methods:
        return None
    figure, axes = _axes(
        len(others), 2.8, f"gains in standard deviations of {report['baseline']}; trained on {trained}"
    )
    for axis, reward in zip(axes, others, strict=True):
        for place, method in enumerate(methods):
            x, y = gains[trained, method], gains[reward, method]
            style = {"fmt": "o", "markersize": 4, "color": COLOURS[place % len(COLOURS)], "label": _plain(method)}
            axis.errorbar([x["value"]], [y["value"]], xerr=_errors([x]), yerr=_errors([y]), **style)
        axis.axhline(0, color=GREY, linestyle=":", linewidth=1)
        axis.axvline(0, color=GREY, linestyle=":", linewidth=1)
        axis.set_xlabel(f"gain by {_plain(trained)} (trained on)")
        axis.set_ylabel(f"gain by {_plain(reward)}")
    axes[0].legend(frameon=False, fontsize=8)
    return figure
