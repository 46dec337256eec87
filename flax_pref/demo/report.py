"""The report of a comparison: report.json, report.html, and the pictures grid.png and sweep.png."""

import base64
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flax_pref.evaluation.statistics import bootstrap_interval, gains, wins
from flax_pref.files import replacing
from flax_pref.images.grid import image_grid

LABELS = {"base": "base", "cfg": "tuned CFG", "dpo": "DPO", "pgd": "PGD", "cpgd": "cPGD"}
WChoice = Literal["mean_of_winners", "mean"]
CHOICES = {
    "mean_of_winners": "Chosen is the largest mean among the strengths whose win rate over the base lies in the 95 % "
    "interval of the largest win rate.",
    "mean": "Chosen is the largest mean.",
}


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """What one method drew and how it scored; prompts and noise are the same for all methods.

    Attributes:
        name: "base", "dpo", ...; the first method of a report is the one that the others are compared with.
        scores: `[N]` on the held-out prompts.
        train_scores: `[M]` on training prompts.
        images: `[N, H, W, 3]` in [0, 1], of the held-out prompts.
        predictions: network evaluations per image.
        guidance_scale: s of classifier-free guidance.
        w: strength of the modules; None for methods without.
    """

    name: str
    scores: np.ndarray
    train_scores: np.ndarray
    images: np.ndarray
    predictions: int
    guidance_scale: float
    w: float | None = None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Scores on validation prompts, from which strengths are chosen.

    Attributes:
        scores: method -> strength -> `[N]`; the strength of "cfg" is its guidance scale, that of others is w.
        constant: method without a choice -> `[N]`; "base" is what win rates are against.
        choice: see `DemoConfig.choice`.
    """

    scores: Mapping[str, Mapping[float, np.ndarray]]
    constant: Mapping[str, np.ndarray]
    choice: WChoice = "mean_of_winners"

    def wins(self, method: str) -> dict[float, np.ndarray]:
        """For each strength, wins over the base `[N]`."""
        return {strength: wins(scores, self.constant["base"]) for strength, scores in self.scores[method].items()}

    def best(self, method: str) -> float:
        """The strength of the largest mean score, among those that win about as often as any."""
        candidates = self.scores[method]
        if self.choice == "mean_of_winners":
            won = self.wins(method)
            least, _ = bootstrap_interval(max(won.values(), key=np.mean))
            candidates = {strength: scores for strength, scores in candidates.items() if won[strength].mean() >= least}
        return max(candidates, key=lambda strength: candidates[strength].mean())

    def ends(self) -> dict[str, float]:
        """Methods whose best strength is the first or the last of its candidates, and that strength."""
        best = {method: self.best(method) for method in self.scores}
        return {method: best[method] for method, by in self.scores.items() if best[method] in (min(by), max(by))}


def compare(scores: np.ndarray, baseline: np.ndarray) -> dict:
    """Win rate (ties one half) and mean gain over a baseline, each with its 95 % bootstrap interval."""
    won, gained = wins(scores, baseline), gains(scores, baseline)
    return {
        "win_rate": float(won.mean()),
        "win_rate_ci": list(bootstrap_interval(won)),
        "gain": float(gained.mean()),
        "gain_ci": list(bootstrap_interval(gained)),
    }


def build_report(results: Sequence[MethodResult], seconds: float) -> dict:
    """What report.json holds.

    `methods` has for each method its mean score on held-out and on training prompts, the predictions that an image
    takes, its strengths and, except for the first, its win rate and gain over the first on held-out prompts.
    `comparisons` sets every later pair of methods side by side, on both kinds of prompts.
    """
    first, *others = results
    methods: dict[str, dict[str, float | None]] = {
        result.name: {
            "w": result.w,
            "guidance_scale": result.guidance_scale,
            "predictions": result.predictions,
            "mean": float(result.scores.mean()),
            "train_mean": float(result.train_scores.mean()),
            **({} if result is first else compare(result.scores, first.scores)),
        }
        for result in results
    }
    comparisons = {
        f"{later.name} vs {earlier.name}": {
            "held_out": compare(later.scores, earlier.scores),
            "train": compare(later.train_scores, earlier.train_scores),
        }
        for i, later in enumerate(others)
        for earlier in others[:i]
    }
    return {"prompts": len(first.scores), "seconds": seconds, "methods": methods, "comparisons": comparisons}


def table(report: Mapping) -> list[list[str]]:
    """The comparison as rows of text, the header first."""
    rows = [["method", "s", "w", "predictions", "held-out", "training", "win rate over base", "gain over base"]]
    methods: Mapping[str, Mapping[str, Any]] = report["methods"]
    for name, values in methods.items():
        w = values.get("w")
        rows.append(
            [
                LABELS.get(name, name),
                f"{values['guidance_scale']:g}",
                "" if w is None else f"{w:g}",
                f"{values['predictions']}",
                f"{values['mean']:.3f}",
                f"{values['train_mean']:.3f}",
                _with_interval(values, "win_rate", ".1%") if "win_rate" in values else "",
                _with_interval(values, "gain", "+.3f") if "gain" in values else "",
            ]
        )
    return rows


def comparison_table(report: Mapping) -> list[list[str]]:
    """The methods against one another, as rows of text, the header first."""
    rows = [["", "gain on held-out prompts", "gain on training prompts"]]
    for names, values in report["comparisons"].items():
        later, earlier = (LABELS.get(name, name) for name in names.split(" vs "))
        gain = [_with_interval(values[prompts], "gain", "+.3f") for prompts in ("held_out", "train")]
        rows.append([f"{later} over {earlier}", *gain])
    return rows


def _with_interval(values: Mapping, name: str, form: str) -> str:
    low, high = values[f"{name}_ci"]
    return f"{values[name]:{form}}  [{low:{form}}, {high:{form}}]"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns, for a terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def write_report(
    report: Mapping,
    results: Sequence[MethodResult],
    sweep: Sweep,
    captions: Sequence[str],
    folder: str | Path,
    *,
    title: str,
    scorer: str,
    settings: Mapping[str, object],
) -> None:
    """Writes report.json, report.html, grid.png and sweep.png; each appears under its name when it is complete.

    Args:
        report: from `build_report`.
        results: of every method.
        sweep: of the validation prompts.
        captions: N held-out prompts.
        folder: is there already.
        title: of the page.
        scorer: what the scores are, e.g. "judge's score, 0 to 1".
        settings: name -> value, listed at the end of the page.
    """
    folder = Path(folder)
    shown = pictured(gains(results[-1].scores, results[0].scores))
    chosen = list(shown)
    grid = {LABELS.get(result.name, result.name): result.images[chosen] for result in results}
    image_grid(grid, [f"{captions[i]} ({place})" for i, place in shown.items()], folder / "grid.png")
    _replace(folder / "sweep.png", _sweep_plot(sweep, scorer))
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (resources.files("flax_pref.evaluation") / "templates" / "demo.html.jinja").read_text(encoding="utf-8")
    )
    page = template.render(
        title=title,
        scorer=scorer,
        report=report,
        tables=[table(report), comparison_table(report)],
        choice=CHOICES[sweep.choice],
        pictures={name: base64.b64encode((folder / f"{name}.png").read_bytes()).decode() for name in ("grid", "sweep")},
        settings=settings,
    )
    _replace(folder / "report.html", page.encode())
    # Last: who finds report.json finds everything.
    _replace(folder / "report.json", (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())


PICTURED = {"upper decile": (0.9, 3), "median": (0.5, 3), "lower decile": (0.1, 2)}


def pictured(gained: np.ndarray) -> dict[int, str]:
    """The prompts that the grid shows, by a rule and never by hand: those nearest in rank to deciles of the gain.

    Args:
        gained: by the last method over the first, `[N]`.

    Returns:
        Numbers of prompts, each with its place and its gain.
    """
    order = np.argsort(gained, kind="stable")[::-1]
    shown: dict[int, str] = {}
    for place, (quantile, count) in PICTURED.items():
        middle = round((1 - quantile) * (len(order) - 1))
        start = max(0, min(middle - count // 2, len(order) - count))
        shown |= {int(i): f"{place}, {gained[i]:+.2f}" for i in order[start : start + count] if int(i) not in shown}
    return shown


def _replace(file: Path, content: bytes) -> None:
    with replacing(file) as unfinished:
        unfinished.write_bytes(content)


COLOURS = {"base": "#8a8a93", "cfg": "#8a8a93", "dpo": "#2f6db3", "pgd": "#d9822b", "cpgd": "#2a8f5d"}


def _sweep_plot(sweep: Sweep, scorer: str) -> bytes:
    """Mean score and win rate over the base against w, and against the guidance scale of the base."""
    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    kinds = (("guidance scale s of the base", ("cfg",)), ("strength w of the modules", ("pgd", "cpgd")))
    rows = figure.subplots(2, 2, sharex="col", sharey="row", width_ratios=(1, 1.6))
    for column, (axis, methods) in enumerate(kinds):
        scores, won = rows[0][column], rows[1][column]
        for name, constant in sweep.constant.items():
            line = {"color": COLOURS.get(name), "linestyle": "--", "label": LABELS.get(name, name), "zorder": 1}
            scores.axhline(float(constant.mean()), **line)
            won.axhline(float(wins(constant, sweep.constant["base"]).mean()), **line)
        for name in methods:
            for axes, by_strength in ((scores, sweep.scores[name]), (won, sweep.wins(name))):
                _course(axes, by_strength, sweep.best(name), COLOURS.get(name), LABELS.get(name, name))
        won.set_xlabel(f"{axis} (circled: chosen)")
        scores.legend(frameon=False, fontsize=8)
        for axes in (scores, won):
            axes.spines[["top", "right"]].set_visible(False)
    rows[0][0].set_ylabel(scorer, fontsize=9)
    rows[1][0].set_ylabel("win rate over the base", fontsize=9)
    rows[0][0].set_title("Validation prompts: mean and 95 % interval", loc="left", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _course(axes: Axes, by_strength: Mapping[float, np.ndarray], best: float, colour: str | None, label: str) -> None:
    """A line of means with their intervals, and a circle around the best strength."""
    strengths = sorted(by_strength)
    low, high = zip(*(bootstrap_interval(by_strength[w]) for w in strengths), strict=True)
    axes.fill_between(strengths, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        strengths, [by_strength[w].mean() for w in strengths], color=colour, marker="o", markersize=4, label=label
    )
    axes.plot(best, by_strength[best].mean(), "o", markersize=11, markerfacecolor="none", markeredgecolor=colour)
