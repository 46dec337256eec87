"""The page of the study: each question with a table, a figure and an answer, all from the table of measurements.

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
from flax_pref.evaluation.statistics import crossed_interval, won
from flax_pref.files import replacing

COLOURS = ("#2f6db3", "#d9822b", "#2a8f5d", "#b3365b", "#6a51a3", "#8a8a93", "#17a2a2", "#7f5539")


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


def estimate(values: np.ndarray) -> Estimate:
    """Mean and interval of values `[R, N]`, of R training seeds and N prompts."""
    return Estimate(float(np.mean(values)), *crossed_interval(values))


class Section(NamedTuple):
    """A question and what was found."""

    title: str
    question: str
    answers: Sequence[str]
    rows: Sequence[Sequence[str]]
    figure: Figure | None = None


class Evidence:
    """The measurements, as the sections ask for them."""

    def __init__(self, rows: Iterable[Measurement], config: StudyConfig):
        self.config = config
        self.found: dict[tuple, dict[int, np.ndarray]] = {}
        self.strengths: dict[tuple[str, str], dict[int, float | None]] = {}
        for row in rows:
            keys: list[tuple] = [(row.cell, row.way, row.split, row.term, row.strength)]
            if row.chosen:
                keys.append((row.cell, row.way, row.split, row.term, "chosen"))
                self.strengths.setdefault((row.cell, row.way), {})[row.seed] = row.strength
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

    def gain(self, cell: str, way: str, over: str = "base", **what) -> Estimate:
        """Mean gain of a way over another of the same cell, at its chosen strength or another."""
        other = {**what, "strength": "chosen"}
        return estimate(self.values(cell, way, **what) - self.values(cell, over, **other))

    def wins(self, cell: str, way: str, over: str = "base", **what) -> Estimate:
        """Share of prompts on which a way beats another; ties count one half."""
        other = {**what, "strength": "chosen"}
        return estimate(won(self.values(cell, way, **what) - self.values(cell, over, **other)))

    def strength(self, cell: str, way: str) -> str:
        """Chosen on the validation prompts, by each training seed."""
        by_seed = self.strengths[cell, way]
        return ", ".join("" if by_seed[seed] is None else f"{by_seed[seed]:g}" for seed in sorted(by_seed)).strip(", ")

    def says(self, cell: str, one: str, other: str, **what) -> str:
        """One sentence: whether a way gains over another."""
        gained = self.gain(cell, one, other, **what)
        where = {"held_out": "held-out", "train": "training"}[what.get("split", "held_out")]
        if gained.low > 0:
            return f"{one} scores higher than {other} on {where} prompts: {gained}."
        if gained.high < 0:
            return f"{one} scores lower than {other} on {where} prompts: {gained}."
        return f"Between {one} and {other} no difference is shown on {where} prompts: {gained}."

    def table(self, cell: str, ways: Sequence[str]) -> list[list[str]]:
        """A row for each way of a cell."""
        rows = [["way", "strength", "predictions", "gain over base", "wins", "gain on training prompts"]]
        for name in ways:
            rows.append(
                [
                    name,
                    self.strength(cell, name),
                    str(predictions(self.config.demo, name)),
                    "" if name == "base" else str(self.gain(cell, name)),
                    "" if name == "base" else self.wins(cell, name).percent,
                    "" if name == "base" else str(self.gain(cell, name, split="train")),
                ]
            )
        return rows


def predictions(config: DemoConfig, name: str) -> int:
    """Network evaluations per image."""
    way = WAYS[name]
    rule = way.rule(1.5, config.guidance_scale)
    if way.merged:
        rule = WAYS["base"].rule(None, config.guidance_scale)
    return way.best_of * tabulate(rule, way.steps * config.sampling_steps, 1).evaluations


# ----------------------------------------------------------------------------------------------------------------------
# The questions

METHODS = ("base", "tuned CFG", "DPO", "PGD", "cPGD")
MODULES = ("DPO", "PGD", "cPGD")
MAIN = "main"


def main_comparison(found: Evidence) -> Section | None:
    """Question a, at the settings of the demo."""
    if not found.has(MAIN, *METHODS):
        return None
    pairs = [("PGD", "DPO"), ("cPGD", "DPO"), ("cPGD", "PGD"), ("DPO", "tuned CFG"), ("cPGD", "tuned CFG")]
    answers = [found.says(MAIN, one, other) for one, other in pairs]
    return Section(
        "The methods side by side",
        "What do base, tuned CFG, DPO, PGD and cPGD score, each at the strength that validation prompts choose?",
        answers,
        found.table(MAIN, METHODS),
    )


def regimes(found: Evidence) -> Section | None:
    """Question a, by what modules are trained on and for how long."""
    groups = {
        "pairs": lambda cell: cell.pairs,
        "training, times the demo's steps": lambda cell: cell.training if cell.training != 1 else None,
        "label temperature": lambda cell: cell.label_temperature,
    }
    demo, panels = found.config.demo, {}
    standard = {"pairs": demo.pairs, "label temperature": demo.label_temperature}
    for title, of in groups.items():
        cells = {of(cell): cell.name for cell in found.config.cells if of(cell) is not None}
        cells[standard.get(title, 1.0)] = MAIN
        cells = {value: name for value, name in sorted(cells.items()) if found.has(name, "base", *MODULES)}
        if len(cells) > 1:
            panels[title] = cells
    others = {cell.name: cell.name for cell in found.config.cells if cell.generators is not None}
    others = {name: name for name in others if found.has(name, "base", *MODULES)}
    if not panels and not others:
        return None
    rows = [["what varies", "value", *MODULES, "best"]]
    for title, cells in [*panels.items(), *((("generators", others),) if others else ())]:
        for value, name in cells.items():
            gained = {method: found.gain(name, method) for method in MODULES}
            best = max(gained, key=lambda method: gained[method].mean)
            rows.append(
                [title, f"{value:g}" if isinstance(value, float | int) else value, *map(str, gained.values()), best]
            )
    answers = [
        found.says(name, "cPGD", "DPO").removesuffix(".") + f" (where {title} is {value:g})."
        for title, cells in panels.items()
        for value, name in cells.items()
    ]
    figure = None
    if panels:
        figure, axes = _figure(len(panels), width=3.6 * len(panels))
        for axis, (title, cells) in zip(axes, panels.items(), strict=True):
            for colour, method in zip(COLOURS, MODULES, strict=False):
                _course(axis, {value: found.gain(name, method) for value, name in cells.items()}, colour, method)
            axis.set_xscale("log", base=2)
            axis.set_xlabel(title)
        axes[0].set_ylabel("gain over base, held-out prompts")
        axes[0].legend(frameon=False)
    return Section(
        "Pairs, training, labels",
        "Where does each method win: by number of pairs, length of training, noise of labels, and origin of images?",
        answers,
        rows,
        figure,
    )


def versus(title: str, question: str, ways: Sequence[str], pairs: Sequence[tuple[str, str]], cell: str = MAIN):
    """A section that compares ways of one cell."""

    def section(found: Evidence) -> Section | None:
        if not found.has(cell, *ways):
            return None
        figure, (axis,) = _figure(1, width=7.0, height=0.8 + 0.36 * len(ways))
        gained = {name: found.gain(cell, name) for name in ways if name != "base"}
        for row, value in enumerate(reversed(gained.values())):
            axis.plot([value.low, value.high], [row, row], color=COLOURS[0], linewidth=2)
            axis.plot(value.mean, row, "o", color=COLOURS[0])
        axis.set_yticks(range(len(gained)), list(reversed(gained)))
        axis.axvline(0, color="#8a8a93", linewidth=1)
        axis.set_xlabel("gain over base, held-out prompts: mean and 95 % interval")
        answers = [found.says(cell, one, other) for one, other in pairs]
        return Section(title, question, answers, found.table(cell, ways), figure)

    return section


def merging(found: Evidence) -> Section | None:
    """Question e: what merging costs at equal w, by length of training."""
    cells = {cell.training: cell.name for cell in found.config.cells if cell.training != 1} | {1.0: MAIN}
    ways = ("PGD", "PGD, merged", "cPGD", "cPGD, merged")
    cells = {length: name for length, name in sorted(cells.items()) if found.has(name, *ways)}
    if not cells:
        return None
    rows = [["method", "training", *(f"w = {w:g}" for w in found.config.w)]]
    answers = []
    figure, axes = _figure(2, width=8.0)
    for axis, method in zip(axes, ("PGD", "cPGD"), strict=True):
        for colour, (length, name) in zip(COLOURS, cells.items(), strict=False):
            cost = {
                w: estimate(
                    found.values(name, f"{method}, merged", split="validation", strength=w)
                    - found.values(name, method, split="validation", strength=w)
                )
                for w in found.config.w
            }
            rows.append([method, f"{length:g}", *map(str, cost.values())])
            _course(axis, cost, colour, f"{length:g} times the training")
            worse = [f"{w:g}" for w, value in cost.items() if value.high < 0]
            answers.append(
                f"{method} at {length:g} times the demo's training: merging scores lower at w = {', '.join(worse)}."
                if worse
                else f"{method} at {length:g} times the demo's training: no w shows a loss by merging."
            )
        axis.axhline(0, color="#8a8a93", linewidth=1)
        axis.set_xlabel(f"w of {method}")
    axes[0].set_ylabel("merged minus guided, validation prompts")
    axes[0].legend(frameon=False, fontsize=8)
    return Section(
        "Merging at equal strength",
        "At the same w, when does merging into weights stop being free?",
        answers,
        rows,
        figure,
    )


def terms(found: Evidence) -> Section | None:
    """Question f: what guidance improves, and what it pays with."""
    names = ("found", "place", "background", "edges", "cleanness", "contrast", "composition")
    methods = [name for name in ("PGD", "cPGD") if (MAIN, name, "held_out", "spread", "chosen") in found.found]
    strengths = {
        name: sorted(
            key[4]
            for key in found.found
            if key[:4] == (MAIN, name, "held_out", "score") and isinstance(key[4], float | int)
        )
        for name in methods
    }
    if not methods or any(len(by) < 2 for by in strengths.values()):
        return None
    rows = [["method", "w", *names, "spread of images"]]
    figure, axes = _figure(len(methods), width=4.2 * len(methods))
    answers = []
    for axis, method in zip(axes, methods, strict=True):
        by_w = {w: {t: found.gain(MAIN, method, term=t, strength=w) for t in names} for w in strengths[method]}
        for w, by in by_w.items():
            spread = found.gain(MAIN, method, term="spread", strength=w)
            rows.append([method, f"{w:g}", *(f"{by[t].mean:+.3f}" for t in names), str(spread)])
        for colour, term in zip(COLOURS, names, strict=False):
            _course(axis, {w: by[term] for w, by in by_w.items()}, colour, term)
        axis.set_xlabel(f"w of {method}")
        axis.axhline(0, color="#8a8a93", linewidth=1)
        most = by_w[max(by_w)]
        worse = [f"{t} {most[t]}" for t in names if most[t].high < 0]
        better = [f"{t} {most[t]}" for t in names if most[t].low > 0]
        spread = found.gain(MAIN, method, term="spread", strength=max(by_w))
        answers.append(
            f"{method} at w = {max(by_w):g} raises {', '.join(better) or 'no term'}; "
            f"it lowers {', '.join(worse) or 'none'}."
        )
        answers.append(f"{method} at w = {max(by_w):g} changes the spread of a prompt's images by {spread}.")
    axes[0].set_ylabel("change of the term against base")
    axes[0].legend(frameon=False, fontsize=8)
    return Section(
        "What guidance improves, and what it pays with",
        "How does each term of the judge change with w?",
        answers,
        rows,
        figure,
    )


def roles(found: Evidence) -> Section | None:
    """Question d: images that win one pair and lose another."""
    both, unique = "several pairs of a prompt", "several pairs, roles unique"
    ways = [name for name in MODULES if found.has(both, name) and found.has(unique, name)]
    if not ways:
        return None
    rows = [["method", "images in both roles", "images in one role only", "difference"]]
    answers = []
    for name in ways:
        difference = estimate(found.values(unique, name) - found.values(both, name))
        rows.append([name, str(found.gain(both, name)), str(found.gain(unique, name)), str(difference)])
        verdict = "helps" if difference.low > 0 else "hurts" if difference.high < 0 else "shows no difference for"
        answers.append(f"Leaving out images in their other role {verdict} {name}: {difference}.")
    return Section(
        "Images in both roles",
        "Where images of a prompt meet in several pairs, does it matter that one wins here and loses there?",
        answers,
        rows,
    )


def distance(found: Evidence) -> Section | None:
    """Question h: how w relates to how far a module was trained."""
    rows = [["cell", "method", "contrast / eps_base, lengths, early half", "late half", "w chosen, by seed"]]
    points: dict[str, list[tuple[float, float]]] = {"PGD": [], "cPGD": []}
    for cell in found.config.cells:
        for name, of_method in points.items():
            ratios = found.found.get((cell.name, name, "trajectory", "change", "chosen"))
            if ratios is None:
                continue
            mean = np.mean([*ratios.values()], axis=0)
            early, late = mean[: len(mean) // 2].mean(), mean[len(mean) // 2 :].mean()
            rows.append([cell.name, name, f"{early:.3f}", f"{late:.3f}", found.strength(cell.name, name)])
            chosen = found.strengths[cell.name, name]
            of_method += [(float(ratios[seed].mean()), float(chosen[seed] or 0)) for seed in sorted(ratios)]
    if min(map(len, points.values())) < 3:
        return None
    figure, (axis,) = _figure(1, width=5.5)
    answers = []
    for colour, (name, of_method) in zip(COLOURS, points.items(), strict=False):
        x, y = np.array([point[0] for point in of_method]), np.array([point[1] for point in of_method])
        axis.plot(x, y, "o", color=colour, alpha=0.7, label=name)
        ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (x, y)]
        answers.append(
            f"{name}: the rank correlation of w and the mean ratio over {len(x)} trainings is "
            f"{np.asarray(np.corrcoef(ranks))[0, 1]:+.2f}; "
            f"the product of both has median {np.median(x * y):.2f}, quartiles {np.quantile(x * y, 0.25):.2f} and "
            f"{np.quantile(x * y, 0.75):.2f}."
        )
    axis.set_xscale("log")
    axis.set_xlabel("|contrast at w = 1| / |eps_base|, mean over the trajectory")
    axis.set_ylabel("w chosen")
    axis.legend(frameon=False)
    return Section(
        "Strength and length of training",
        "How does the strength that validation prompts choose relate to how far modules have moved from the base?",
        answers,
        rows,
        figure,
    )


SECTIONS: tuple[Callable[[Evidence], Section | None], ...] = (
    main_comparison,
    regimes,
    versus(
        "The contrast",
        "Is pos - neg better than pos - base, base - neg or dpo - base, and than CFG that takes as many predictions?",
        ("cPGD", "pos - base", "base - neg", "PGD", "CFG, 3 times the steps", "base, best of 3"),
        (
            ("cPGD", "pos - base"),
            ("cPGD", "base - neg"),
            ("cPGD", "CFG, 3 times the steps"),
            ("cPGD", "base, best of 3"),
        ),
    ),
    versus(
        "How the two modules are trained",
        "Supervised on winners and losers, DPO and DPO with swapped labels, CHATS, or one network with SNPO?",
        ("cPGD", "cPGD of a DPO pair", "CHATS", "SNPO"),
        (("cPGD of a DPO pair", "cPGD"), ("CHATS", "cPGD"), ("SNPO", "cPGD")),
    ),
    versus(
        "Merged into weights",
        "What does merging cost, at the strength chosen for each?",
        ("PGD", "PGD, merged", "cPGD", "cPGD, merged", "cPGD, full weights"),
        (("PGD, merged", "PGD"), ("cPGD, merged", "cPGD"), ("cPGD, full weights", "cPGD")),
    ),
    merging,
    roles,
    terms,
    versus(
        "Where on the trajectory",
        "Does the contrast act early or late?",
        ("cPGD", "cPGD, early", "cPGD, late", "preset late"),
        (("cPGD, early", "cPGD"), ("cPGD, late", "cPGD"), ("preset late", "cPGD")),
    ),
    versus(
        "Shaped contrasts",
        "Do a strength that is a share of what guidance adds, a cap, or a contrast orthogonal to it do better?",
        ("PGD", "PGD, norm-matched", "cPGD", "cPGD, norm-matched", "cPGD, capped", "cPGD, orthogonal"),
        (
            ("PGD, norm-matched", "PGD"),
            ("cPGD, norm-matched", "cPGD"),
            ("cPGD, capped", "cPGD"),
            ("cPGD, orthogonal", "cPGD"),
        ),
    ),
    distance,
)


def write_page(rows: Sequence[Measurement], config: StudyConfig, command: str) -> Path:
    """Writes the page beside the folder of results, and its figures into it; returns the page."""
    found = Evidence(rows, config)
    page = config.results.with_suffix(".md")
    cells = {(row.cell, row.seed) for row in rows}
    lines = [
        "# Evidence",
        "",
        "When does contrastive guidance pay? Measured in the [demo world](demo.md): each cell of a grid trains modules "
        "on pairs of its own and draws the same prompts from the same noise. Strengths are chosen on "
        f"{config.demo.validation_prompts} validation prompts; held-out prompts combine attributes as no training "
        "image does. A number is a mean with its 95 % interval over prompts and training seeds (pigeonhole bootstrap). "
        "Scores lie between 0 and 1.",
        "",
        f"`{command}`: {len(cells)} of {len(config.cells) * len(config.seeds)} trainings are in "
        f"`{config.results.name}/{TABLE}`; what is missing is missing below.",
    ]
    for i, make in enumerate(SECTIONS):
        section = make(found)
        if section is None:
            continue
        lines += ["", f"## {section.title}", "", section.question, ""]
        lines += [f"- {answer}" for answer in section.answers]
        header, *body = section.rows
        lines += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(row) + " |" for row in body]
        if section.figure is not None:
            file = config.results / f"figure_{i}.png"
            buffer = io.BytesIO()
            section.figure.savefig(buffer, format="png")
            with replacing(file) as unfinished:
                unfinished.write_bytes(buffer.getvalue())
            lines += ["", f"![{section.question}]({config.results.name}/{file.name})"]
    with replacing(page) as unfinished:
        unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def _figure(columns: int, *, width: float, height: float = 3.6) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _course(axes: Axes, by_value: Mapping[float, Estimate], colour: str, label: str) -> None:
    values = list(by_value)
    axes.fill_between(
        values,
        [e.low for e in by_value.values()],
        [e.high for e in by_value.values()],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )
    axes.plot(values, [e.mean for e in by_value.values()], color=colour, marker="o", markersize=4, label=label)
