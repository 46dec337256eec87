"""The report of a comparison: report.json, report.html, and the pictures grid.png and sweep.png."""

import base64
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flax_pref.evaluation.statistics import bootstrap_interval, gains, wins
from flax_pref.files import replacing
from flax_pref.images.grid import image_grid

LABELS = {"base": "base", "dpo": "DPO", "pgd": "PGD", "cpgd": "cPGD"}


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """What one method drew and how it scored; prompts and noise are the same for all methods.

    Attributes:
        name: "base", "dpo", ...; the first method of a report is the one that the others are compared with.
        scores: `[N]` on the held-out prompts.
        train_scores: `[M]` on training prompts.
        images: `[N, H, W, 3]` in [0, 1], of the held-out prompts.
        w: strength of the guidance; None for methods without.
    """

    name: str
    scores: np.ndarray
    train_scores: np.ndarray
    images: np.ndarray
    w: float | None = None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Scores on validation prompts, from which w is chosen.

    Attributes:
        scores: method -> w -> `[N]`.
        constant: method without w -> `[N]`, for comparison.
    """

    scores: Mapping[str, Mapping[float, np.ndarray]]
    constant: Mapping[str, np.ndarray]

    def best(self, method: str) -> float:
        """The w of the highest mean score."""
        means = {w: float(np.mean(scores)) for w, scores in self.scores[method].items()}
        return max(means, key=lambda w: means[w])


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

    `methods` has for each method its mean score on held-out and on training prompts and, except for the first, its win
    rate and gain over the first on held-out prompts. `comparisons` sets every later pair of methods side by side, on
    both kinds of prompts.
    """
    first, *others = results
    methods: dict[str, dict[str, float | None]] = {
        first.name: {"mean": float(first.scores.mean()), "train_mean": float(first.train_scores.mean())}
    }
    for result in others:
        methods[result.name] = {
            "mean": float(result.scores.mean()),
            "train_mean": float(result.train_scores.mean()),
            **compare(result.scores, first.scores),
            "w": result.w,
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
    rows = [["method", "w", "held-out score", "training score", "win rate over base", "gain over base"]]
    methods: Mapping[str, Mapping[str, Any]] = report["methods"]
    for name, values in methods.items():
        w = values.get("w")
        rows.append(
            [
                LABELS.get(name, name),
                "" if w is None else f"{w:g}",
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
    rows: int = 8,
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
        rows: prompts in the grid, evenly spread over the N.
    """
    folder = Path(folder)
    chosen = np.linspace(0, len(captions) - 1, min(rows, len(captions))).round().astype(int)
    grid = {LABELS.get(result.name, result.name): result.images[chosen] for result in results}
    image_grid(grid, [captions[int(i)] for i in chosen], folder / "grid.png")
    _replace(folder / "sweep.png", _sweep_plot(sweep, scorer))
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (resources.files("flax_pref.evaluation") / "templates" / "demo.html.jinja").read_text(encoding="utf-8")
    )
    page = template.render(
        title=title,
        scorer=scorer,
        report=report,
        tables=[table(report), comparison_table(report)],
        pictures={name: base64.b64encode((folder / f"{name}.png").read_bytes()).decode() for name in ("grid", "sweep")},
        settings=settings,
    )
    _replace(folder / "report.html", page.encode())
    # Last: who finds report.json finds everything.
    _replace(folder / "report.json", (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())


def _replace(file: Path, content: bytes) -> None:
    with replacing(file) as unfinished:
        unfinished.write_bytes(content)


COLOURS = {"base": "#8a8a93", "dpo": "#2f6db3", "pgd": "#d9822b", "cpgd": "#2a8f5d"}


def _sweep_plot(sweep: Sweep, scorer: str) -> bytes:
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, scores in sweep.constant.items():
        axes.axhline(
            float(np.mean(scores)), color=COLOURS.get(name), linestyle="--", label=LABELS.get(name, name), zorder=1
        )
    for name, by_w in sweep.scores.items():
        ws = sorted(by_w)
        means = [np.mean(by_w[w]) for w in ws]
        low, high = zip(*(bootstrap_interval(by_w[w]) for w in ws), strict=True)
        axes.fill_between(ws, low, high, color=COLOURS.get(name), alpha=0.15, linewidth=0)
        axes.plot(ws, means, color=COLOURS.get(name), marker="o", markersize=4, label=LABELS.get(name, name))
        best = sweep.best(name)
        axes.plot(
            best, np.mean(by_w[best]), "o", markersize=11, markerfacecolor="none", markeredgecolor=COLOURS.get(name)
        )
    axes.set_xlabel("w (circled: chosen)")
    axes.set_ylabel(scorer)
    axes.set_title("Validation prompts: mean and 95 % interval", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
