"""The page of the study, all of it from the table of measurements: `Evidence` answers, `demo.questions` asks.

Answers are put together from the intervals, so that they say what was measured and no more.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flax_pref.demo.experiment import DemoConfig
from flax_pref.demo.study import TABLE, WAYS, Measurement, StudyConfig
from flax_pref.diffusion.guidance import tabulate
from flax_pref.evaluation.markdown import figures_of
from flax_pref.evaluation.statistics import crossed_interval, won
from flax_pref.files import read_json, replacing

COLOURS = ("#2f6db3", "#d9822b", "#2a8f5d", "#b3365b", "#6a51a3", "#8a8a93", "#17a2a2", "#7f5539")
GREY = "#8a8a93"


class Estimate(NamedTuple):
    """A mean over training seeds and prompts with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def percent(self) -> str:
        """As a share."""
        return f"{self.mean:.0%} [{self.low:.0%}, {self.high:.0%}]"

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies above or below zero, else 0; so where the mean is zero to three decimals."""
        return 0 if abs(self.mean) < 0.0005 else int(self.low > 0) - int(self.high < 0)


def estimate(values: np.ndarray, minus: np.ndarray | None = None) -> Estimate:
    """Mean and interval of values `[R, N]`, of R training seeds and N prompts; minus the mean over other prompts."""
    mean = float(np.mean(values)) - (0.0 if minus is None else float(np.mean(minus)))
    return Estimate(mean, *crossed_interval(values, minus))


Rows = Sequence[Sequence[str]]
"""A table: its header, then its rows."""


class Section(NamedTuple):
    """A question and what was found."""

    title: str
    question: str
    answers: Sequence[str]
    tables: Sequence[Rows]
    figure: Figure


class Evidence:
    """The measurements, as the questions ask for them."""

    def __init__(self, rows: Iterable[Measurement], config: StudyConfig):
        self.config = config
        self.found: dict[tuple, dict[int, np.ndarray]] = {}
        self.chosen: dict[tuple[str, str], dict[int, float | None]] = {}
        for row in rows:
            keys: list[tuple] = [(row.cell, row.way, row.split, row.term, row.strength)]
            if row.chosen:
                keys.append((row.cell, row.way, row.split, row.term, "chosen"))
                self.chosen.setdefault((row.cell, row.way), {})[row.seed] = row.strength
            for key in keys:
                self.found.setdefault(key, {})[row.seed] = row.values

    def has(self, cell: str, *ways: str) -> bool:
        """Whether a cell has been measured with these ways."""
        return all((cell, way, "held_out", "score", "chosen") in self.found for way in ways)

    def values(
        self, cell: str, way: str, *, split: str = "held_out", term: str = "score", strength: float | str = "chosen"
    ) -> np.ndarray:
        """Values `[R, N]` of R training seeds and N prompts, at one strength or at the one that each seed chose."""
        by_seed = self.found[cell, way, split, term, strength]
        return np.stack([by_seed[seed] for seed in sorted(by_seed)])

    def gains(
        self,
        cell: str,
        way: str,
        over: str = "base",
        *,
        split: str = "held_out",
        term: str = "score",
        strength: float | str = "chosen",
        over_strength: float | str = "chosen",
        over_cell: str | None = None,
    ) -> np.ndarray:
        """Gains `[R, N]` of a way over another, of the same cell by default, for the training seeds that have both."""
        one = self.found[cell, way, split, term, strength]
        other = self.found[over_cell or cell, over, split, term, over_strength]
        return np.stack([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])

    def gain(self, cell: str, way: str, over: str = "base", **what) -> Estimate:
        """Mean gain of a way over another of the same cell, at its chosen strength or another."""
        return estimate(self.gains(cell, way, over, **what))

    def gap(self, cell: str, way: str) -> Estimate:
        """How much larger the gain over the base is on training prompts than on held-out ones."""
        return estimate(self.gains(cell, way, split="train"), self.gains(cell, way))

    def wins(self, cell: str, way: str, over: str = "base", **what) -> Estimate:
        """Share of prompts on which a way beats another; ties count one half."""
        return estimate(won(self.gains(cell, way, over, **what)))

    def strength(self, cell: str, way: str) -> str:
        """Chosen on the validation prompts, by each training seed; an end of the candidates is marked."""
        candidates = [value for value in self.config.candidates(WAYS[way]) if value is not None]
        if not candidates:
            return ""
        marks = {min(candidates): "≤ ", max(candidates): "≥ "}
        by_seed = self.chosen[cell, way]
        values = [by_seed[seed] or 0.0 for seed in sorted(by_seed)]
        return ", ".join(f"{marks.get(value, '')}{value:.3g}" for value in values)

    def says(self, cell: str, one: str, other: str, **what) -> str:
        """One sentence: whether a way gains over another."""
        gained = self.gain(cell, one, other, **what)
        one, other = (f'"{name}"' if "," in name else name for name in (one, other))  # a comma is no end of a name
        if not gained.sign:
            return f"Between {one} and {other} no difference is shown: {gained}."
        return f"{one} scores {'higher' if gained.sign > 0 else 'lower'} than {other}: {gained}."

    def table(self, cell: str, ways: Sequence[str]) -> list[list[str]]:
        """A row for each way of a cell."""
        header = ["way", "strength", "predictions", "gain over base", "wins", "training gain minus held-out gain"]
        rows = [header]
        for name in ways:
            row = [name, self.strength(cell, name), str(predictions(self.config.demo, name))]
            if name == "base":
                rows.append([*row, "", "", ""])
                continue
            gained, wins = str(self.gain(cell, name)), self.wins(cell, name).percent
            rows.append([*row, gained, wins, str(self.gap(cell, name))])
        return rows


def predictions(config: DemoConfig, name: str) -> int:
    """Network evaluations per image."""
    way = WAYS[name]
    rule = way.rule(1.5, config.guidance_scale)
    if way.merged:
        rule = WAYS["base"].rule(None, config.guidance_scale)
    return way.best_of * tabulate(rule, way.steps * config.sampling_steps, 1).evaluations


def write_page(
    rows: Sequence[Measurement],
    config: StudyConfig,
    questions: Sequence[Callable[[Evidence], Section | None]],
    command: str,
) -> Path:
    """Writes the page beside the folder of results, and its figures into it; returns the page.

    Args:
        rows: the table; questions that it cannot answer are left out.
        config: of the study.
        questions: sections of the page, in order.
        command: that measures and writes all this.
    """
    rows = counted(rows, config)
    found = Evidence(rows, config)
    page = config.results.with_suffix(".md")
    cells = {(row.cell, row.seed) for row in rows}
    lines = [
        "# Evidence",
        "",
        "When does contrastive guidance pay? Measured in the [demo world](demo.md), by its judge, whose score lies "
        "between 0 and 1. Each cell of a grid has pairs of its own, trains modules on them with several seeds, and "
        "draws the same prompts from the same noise in every way. "
        f"{config.demo.validation_prompts} validation prompts choose the strength of each way and seed by the rule of "
        "the demo; ≤ or ≥ marks a choice at an end of the candidates, whose best may lie beyond. Held-out prompts "
        "combine attributes as no training image does. A number is a mean with its 95 % interval over prompts and "
        "training seeds (pigeonhole bootstrap; with three seeds rather too narrow). No correction is made for the "
        "number of comparisons: of a hundred without any difference about five would show one.",
        "",
        f"`{command}` measures and writes all of this; {config.takes or 'its time was not measured'}. "
        f"{len(cells)} of {sum(len(config.seeds_of(cell)) for cell in config.cells)} trainings are measured in "
        f"`{config.results.name}/{TABLE}`" + ("." if not _missing(found) else "; the page leaves out what is missing."),
    ]
    figures = []
    for make in questions:
        section = make(found)
        if section is None:
            continue
        lines += ["", f"## {section.title}", "", section.question, ""]
        lines += [f"- {answer}" for answer in section.answers]
        name = section.title.lower().replace(" ", "_").replace(",", "") + ".png"
        figures.append(name)
        buffer = io.BytesIO()
        section.figure.savefig(buffer, format="png")
        with replacing(config.results / name) as unfinished:
            unfinished.write_bytes(buffer.getvalue())
        lines += ["", f"![{section.question}]({config.results.name}/{name})"]
        for header, *body in section.tables:
            lines += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
            lines += ["| " + " | ".join(row) + " |" for row in body]
    lines += _controls(config.results)
    with replacing(page) as unfinished:
        unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for old in config.results.glob("*.png"):  # of a question that is asked no more, or cannot be answered now
        if old.name not in figures:
            old.unlink()
    return page


CONTROLS = "controls.json"


def _controls(results: Path) -> list[str]:
    """The section about a report of the demo's methods beside controls, where there is one among the results."""
    if not (results / CONTROLS).is_file():
        return []
    report = read_json(results / CONTROLS, expected="report.json of a comparison with controls")
    told = (
        "The demo's modules, drawn by the programs that users have, beside controls of the base model that use no "
        "preferences and spend as much: its guidance scale tuned on the validation prompts, more steps, and the best "
        "of several images by the judge itself, which no other way here may ask. One training seed; intervals over "
        f"prompts. Drawn on {report['created']} on {report['methods'][0]['cost']['devices']}, beside other work: "
        "seconds are upper bounds."
    )
    adapters = "--module pos=runs/demo/pos.safetensors --module neg=runs/demo/neg.safetensors"
    draw = "python -m sample.images --model demo --prompts runs/demo/prompts/held_out.txt --steps 8 --guidance-scale 3"
    rest = "--prompts runs/demo/prompts/held_out.txt --validation runs/demo/prompts/validation.txt"
    commands = [
        "make demo",
        f"{draw} --batch-size 32 --out runs/base",
        f"{draw} --batch-size 32 --rule fine_tuned --module dpo=runs/demo/dpo.safetensors --out runs/dpo",
        f"{draw} --batch-size 32 --rule pgd --w 2 --module dpo=runs/demo/dpo.safetensors --out runs/pgd",
        f"{draw} --batch-size 32 --rule cpgd --w 2 {adapters} --out runs/cpgd",
        f"python -m sample.controls runs/base runs/dpo runs/pgd runs/cpgd {rest} --batch-size 32 \\",
        "  --rewards judge saturation contrast sharpness --guidance-scales 1 1.5 2 3 4 6",
    ]
    figures = "\n\n".join(figures_of(report)).splitlines()
    return ["", "## What a fair comparison says", "", told, "", "```sh", *commands, "```", "", *figures]


def counted(rows: Sequence[Measurement], config: StudyConfig) -> list[Measurement]:
    """Rows of trainings that are measured in every way of their cell; of cells that have none such, all rows."""
    ways: dict[tuple[str, int], set[str]] = {}
    for row in rows:
        ways.setdefault((row.cell, row.seed), set()).add(row.way)
    wanted = {cell.name: set(cell.ways) for cell in config.cells}
    complete = {key for key, measured in ways.items() if measured >= wanted[key[0]]}
    begun = {cell for cell, _ in complete}
    return [row for row in rows if (row.cell, row.seed) in complete or row.cell not in begun]


def _missing(found: Evidence) -> bool:
    config = found.config
    wanted = {(cell.name, way): set(config.seeds_of(cell)) for cell in config.cells for way in cell.ways}
    return any(seeds - set(found.chosen.get(key, ())) for key, seeds in wanted.items())


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def figure_of(
    columns: int, *, width: float, height: float = 3.6, rows: int = 1, shared: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure with panels row by row, of which those side by side share the vertical axis."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey="row" if shared else False).ravel())
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def course(axes: Axes, by_value: Mapping[float, Estimate], colour: str, label: str, style: str = "-") -> None:
    """A line of means over numbers, with its intervals as a band."""
    values = list(by_value)
    low, high = ([getattr(each, end) for each in by_value.values()] for end in ("low", "high"))
    axes.fill_between(values, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(values, [e.mean for e in by_value.values()], style, color=colour, marker="o", markersize=4, label=label)


def bars(axes: Axes, by_name: Mapping[str, Estimate], colour: str, label: str = "", shift: float = 0.0) -> None:
    """A row for each name, the first on top: the mean as a point, the interval as a line."""
    for row, value in enumerate(by_name.values()):
        axes.plot([value.low, value.high], [row + shift] * 2, color=colour, linewidth=2)
        axes.plot(value.mean, row + shift, "o", color=colour, label=label if row == 0 else None)
    axes.set_yticks(range(len(by_name)), list(by_name))
    axes.set_ylim(len(by_name) - 0.5, -0.5)
    axes.axvline(0, color=GREY, linewidth=1, zorder=0)
