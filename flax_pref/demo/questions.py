"""What the study asks of its measurements: a function for each section of the page, see `demo.evidence`.

Each returns None where the table cannot answer it yet.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from flax_pref.demo.evidence import COLOURS, GREY, Evidence, Section, bars, course, estimate, figure_of, predictions
from flax_pref.demo.online import CALLS, ONLINE, PREDICTIONS
from flax_pref.demo.study import MORE_RATES, OFFLINE, OFFLINE_RATES, WAYS

MAIN = "main"
METHODS = ("base", "tuned CFG", "DPO", "DPO, tuned CFG", "PGD", "cPGD")
MODULES = ("DPO", "PGD", "cPGD")
CONTRASTIVE = ("PGD", "cPGD")
ORIGIN = "images of pairs"
LEAST_SHOWN = -0.1  # gain in plots of learning rates; tables have those of trainings that came apart


def side_by_side(found: Evidence) -> Section | None:
    """Question a, at the settings of the demo."""
    if not found.has(MAIN, *METHODS):
        return None
    pairs = [("DPO", "tuned CFG"), ("DPO, tuned CFG", "DPO"), ("PGD", "DPO"), ("PGD", "DPO, tuned CFG")]
    pairs += [("cPGD", "DPO"), ("cPGD", "DPO, tuned CFG"), ("cPGD", "PGD"), ("cPGD", "tuned CFG")]
    figure, (axes,) = figure_of(1, width=7.0, height=3.0)
    ways = METHODS[1:]
    bars(axes, {name: found.gain(MAIN, name) for name in ways}, COLOURS[0], "held-out prompts", -0.12)
    bars(axes, {name: found.gain(MAIN, name, split="train") for name in ways}, COLOURS[1], "training prompts", 0.12)
    axes.set_xlabel("gain over base")
    axes.legend(frameon=False)
    gaps = {name: found.gap(MAIN, name) for name in ways}
    return Section(
        "The methods side by side",
        "What do tuned CFG, DPO, PGD and cPGD gain over the base, each at the strength that validation prompts choose?",
        [
            *(found.says(MAIN, one, other) for one, other in pairs),
            "Gain on training prompts minus gain on held-out prompts: "
            + "; ".join(f"{name} {gap}" for name, gap in gaps.items() if name in MODULES)
            + ".",
        ],
        [found.table(MAIN, METHODS)],
        figure,
    )


class Regime(NamedTuple):
    """What modules were trained on or for how long: where it stands on an axis, its label, and its cell."""

    place: float
    label: str
    cell: str


def _regimes(found: Evidence) -> dict[str, list[Regime]]:
    """What varies -> the regimes that have been measured, in order."""
    demo, cells = found.config.demo, found.config.cells
    numbers: dict[str, list[tuple[float | None, str]]] = {
        "number of pairs": [(demo.pairs, MAIN), *((cell.pairs, cell.name) for cell in cells)],
        "training, times the demo's": [
            (1.0, MAIN),
            *((cell.training, cell.name) for cell in cells if cell.training != 1),
        ],
        "label temperature": [(demo.label_temperature, MAIN), *((cell.label_temperature, cell.name) for cell in cells)],
    }
    varied = {
        title: sorted(Regime(value, f"{value:g}", cell) for value, cell in values if value is not None)
        for title, values in numbers.items()
    }
    origins = ["four generators", *(cell.name for cell in cells if cell.generators is not None)]
    varied[ORIGIN] = [Regime(i, name.removeprefix("pairs of "), name if i else MAIN) for i, name in enumerate(origins)]
    measured = {
        title: [regime for regime in regimes if found.has(regime.cell, "base", *MODULES)]
        for title, regimes in varied.items()
    }
    return {title: regimes for title, regimes in measured.items() if len(regimes) > 1}


def regimes(found: Evidence) -> Section | None:
    """Question a, by what modules are trained on and for how long."""
    panels = _regimes(found)
    if not panels:
        return None
    figure, axes = figure_of(len(panels), width=3.3 * len(panels))
    for axis, (title, shown) in zip(axes, panels.items(), strict=True):
        for colour, method in zip(COLOURS, MODULES, strict=False):
            course(axis, {regime.place: found.gain(regime.cell, method) for regime in shown}, colour, method)
        if title != ORIGIN:
            axis.set_xscale("log", base=2)
            axis.minorticks_off()
        axis.set_xticks([regime.place for regime in shown], [regime.label.replace(" ", "\n") for regime in shown])
        axis.set_xlabel(title)
    axes[0].set_ylabel("gain over base, held-out prompts")
    axes[0].legend(frameon=False)
    pairs = [("PGD", "DPO"), ("cPGD", "DPO"), ("cPGD", "PGD"), ("tuned CFG", "base")]
    gains = [["varies", "value", *MODULES, *(f"{one} over {other}" for one, other in pairs), "w of PGD", "w of cPGD"]]
    gaps = [["varies", "value", *MODULES]]
    names: dict[str, str] = {}
    for title, shown in panels.items():
        for _, label, cell in shown:
            names[cell] = "as in the demo" if cell == MAIN else cell
            by_pair = [str(found.gain(cell, one, other)) for one, other in pairs]
            strengths = [found.strength(cell, method) for method in CONTRASTIVE]
            gains.append([title, label, *(str(found.gain(cell, name)) for name in MODULES), *by_pair, *strengths])
            gaps.append([title, label, *(str(found.gap(cell, name)) for name in MODULES)])
    return Section(
        "Pairs, training, labels",
        "Where does each method win: by number of pairs, length of training, noise of labels, and origin of images? "
        "The second table has the gain on training prompts minus that on held-out prompts.",
        [_where(found, names, one, other) for one, other in pairs],
        [gains, gaps],
        figure,
    )


def _where(found: Evidence, names: Mapping[str, str], one: str, other: str) -> str:
    """One sentence: in which cells a way scores higher than another, and in which lower."""
    signs = {name: found.gain(name, one, other).sign for name in names}
    parts = []
    for sign, verb in ((1, "scores higher than"), (-1, "scores lower than"), (0, "shows no difference to")):
        where = [names[name] for name in names if signs[name] == sign]
        if where:
            parts.append(f"{verb} {other}: {', '.join(where)}")
    return f"{one} {'; '.join(parts)}."


def versus(title: str, question: str, ways: Sequence[str], pairs: Sequence[tuple[str, str]], cell: str = MAIN):
    """A section that compares ways of one cell."""

    def section(found: Evidence) -> Section | None:
        if not found.has(cell, "base", *ways):
            return None
        figure, (axes,) = figure_of(1, width=7.0, height=0.9 + 0.34 * len(ways))
        bars(axes, {name: found.gain(cell, name) for name in ways}, COLOURS[0])
        axes.set_xlabel("gain over base, held-out prompts: mean and 95 % interval")
        answers = [found.says(cell, one, other) for one, other in pairs]
        return Section(title, question, answers, [found.table(cell, ways)], figure)

    return section


def roles(found: Evidence) -> Section | None:
    """Question d: images that win one pair and lose another."""
    both, unique = "several pairs of a prompt", "several pairs, roles unique"
    ways = [name for name in MODULES if found.has(both, name) and found.has(unique, name)]
    if not ways:
        return None
    rows = [["method", "images in both roles", "images in one role only", "difference"]]
    answers = []
    for name in ways:
        difference = estimate(found.gains(unique, name, name, over_cell=both))
        rows.append([name, str(found.gain(both, name)), str(found.gain(unique, name)), str(difference)])
        verdict = {1: "helps", -1: "hurts", 0: "shows no difference for"}[difference.sign]
        answers.append(f"Leaving out images in their other role {verdict} {name}: {difference}.")
    figure, (axes,) = figure_of(1, width=7.0, height=2.2)
    bars(axes, {name: found.gain(both, name) for name in ways}, COLOURS[0], "in both roles", -0.12)
    bars(axes, {name: found.gain(unique, name) for name in ways}, COLOURS[1], "in one role only", 0.12)
    axes.set_xlabel("gain over base, held-out prompts")
    axes.legend(frameon=False)
    return Section(
        "Images in both roles",
        "Where images of a prompt meet in several pairs, does it matter that one wins here and loses there?",
        answers,
        [rows],
        figure,
    )


def _lengths(found: Evidence, *ways: str) -> dict[float, str]:
    """Lengths of training -> the cells that have been measured by these ways."""
    cells = {cell.training: cell.name for cell in found.config.cells if cell.training != 1} | {1.0: MAIN}
    return {length: name for length, name in sorted(cells.items()) if found.has(name, *ways)}


def merging(found: Evidence) -> Section | None:
    """Question e: what merging costs at equal w, by length of training."""
    cells = _lengths(found, "PGD", "PGD, merged", "cPGD", "cPGD, merged")
    if not cells:
        return None
    equal = [["merged minus guided, at equal w", "training", *(f"w = {w:g}" for w in found.config.w)]]
    chosen = [["merged minus guided, at the strength chosen for each", "training", "difference"]]
    answers = []
    figure, axes = figure_of(2, width=8.5)
    for axis, method in zip(axes, CONTRASTIVE, strict=True):
        for colour, (length, name) in zip(COLOURS, cells.items(), strict=False):
            cost = {
                w: found.gain(name, f"{method}, merged", method, split="validation", strength=w, over_strength=w)
                for w in found.config.w
            }
            equal.append([method, f"{length:g}", *map(str, cost.values())])
            course(axis, cost, colour, f"{length:g} times the training")
            ends = {1: "higher", -1: "lower"}
            told = [
                f"{word} at w = {', '.join(f'{w:g}' for w, value in cost.items() if value.sign == sign)}"
                for sign, word in ends.items()
                if any(value.sign == sign for value in cost.values())
            ]
            best = found.gain(name, f"{method}, merged", method)
            chosen.append([method, f"{length:g}", str(best)])
            answers.append(
                f"{method}, {length:g} times the demo's training: merging scores "
                f"{' and '.join(told) or 'no differently at any w'}. Each at its chosen strength: {best}."
            )
        axis.axhline(0, color=GREY, linewidth=1)
        axis.set_xlabel(f"w of {method}")
    axes[0].set_ylabel("merged minus guided, validation prompts")
    axes[0].legend(frameon=False, fontsize=8)
    return Section(
        "Merging into weights",
        "What does merging cost at equal w, and where does it stop being free?",
        answers,
        [chosen, equal],
        figure,
    )


def terms(found: Evidence) -> Section | None:
    """Question f: what guidance improves, and what it pays with."""
    names = ("found", "place", "background", "edges", "cleanness", "contrast", "composition")
    methods = [name for name in CONTRASTIVE if (MAIN, name, "held_out", "spread", "chosen") in found.found]
    if not methods:
        return None
    rows = [["method", "w", *names, "spread of a prompt's images"]]
    figure, axes = figure_of(len(methods), width=4.4 * len(methods))
    answers = []
    for axis, method in zip(axes, methods, strict=True):
        by_w = {w: {t: found.gain(MAIN, method, term=t, strength=w) for t in names} for w in found.config.w}
        spreads = {w: found.gain(MAIN, method, term="spread", strength=w) for w in found.config.w}
        for w, by in by_w.items():
            rows.append([method, f"{w:g}", *(str(by[t]) for t in names), str(spreads[w])])
        for colour, term in zip(COLOURS, names, strict=False):
            course(axis, {w: by[term] for w, by in by_w.items()}, colour, term)
        axis.set_xlabel(f"w of {method}")
        axis.axhline(0, color=GREY, linewidth=1)
        for w in dict.fromkeys((found.config.w[len(by_w) // 2], max(by_w))):
            raised = [f"{t} {by_w[w][t]}" for t in names if by_w[w][t].sign > 0]
            lowered = [f"{t} {by_w[w][t]}" for t in names if by_w[w][t].sign < 0]
            answers.append(
                f"{method} at w = {w:g} raises {', '.join(raised) or 'no term'}; it lowers "
                f"{', '.join(lowered) or 'none'}; the spread of a prompt's images changes by {spreads[w]}."
            )
    axes[0].set_ylabel("change of the term against base")
    axes[0].legend(frameon=False, fontsize=8)
    return Section(
        "What guidance improves, and what it pays with",
        "How does each term of the judge change with w? The spread of a prompt's images is the root mean square "
        "difference of pixels between images from different noise.",
        answers,
        [rows],
        figure,
    )


def trajectory(found: Evidence) -> Section | None:
    """Question g: where on the trajectory the contrast acts, for faithfulness and aesthetics apart."""
    ways = ("cPGD", "cPGD, early", "cPGD, late", "cPGD, prompt only", "preset late")
    if not found.has(MAIN, "base", *ways):
        return None
    parts = ("score", "faithfulness", "aesthetics")
    gained = {name: {part: found.gain(MAIN, name, term=part) for part in parts} for name in ways}
    figure, (axes,) = figure_of(1, width=7.0, height=3.0)
    for colour, part, shift in zip(COLOURS, parts[1:], (-0.12, 0.12), strict=False):
        bars(axes, {name: by[part] for name, by in gained.items()}, colour, part, shift)
    axes.set_xlabel("gain over base, held-out prompts")
    axes.legend(frameon=False)
    rows = [["way", "strength", *(f"gain in {part}" for part in parts)]]
    rows += [[name, found.strength(MAIN, name), *map(str, gained[name].values())] for name in ways]
    answers = []
    for part in parts[1:]:
        early, late = found.gain(MAIN, "cPGD, early", term=part), found.gain(MAIN, "cPGD, late", term=part)
        difference = found.gain(MAIN, "cPGD, early", "cPGD, late", term=part)
        verdict = {1: "more from the first half", -1: "more from the second half", 0: "alike from both halves"}
        answers.append(
            f"{part.capitalize()} gains {verdict[difference.sign]}: first {early}, second {late}, difference "
            f"{difference}."
        )
    answers += [found.says(MAIN, one, "cPGD") for one in ("cPGD, early", "cPGD, late", "preset late")]
    answers.append(found.says(MAIN, "preset late", "cPGD, prompt only"))
    return Section(
        "Where on the trajectory",
        "Does the contrast act in the first half of the steps or in the second, for what an image shows and for how "
        "well it is made? The preset late guides by the prompt in the first half and by modules in the second.",
        answers,
        [rows],
        figure,
    )


def one_strength(found: Evidence) -> Section | None:
    """Whether one share of what guidance adds fits modules that were trained for any length, as one w does not."""
    cells = _lengths(found, *(f"{method}{kind}" for method in CONTRASTIVE for kind in ("", ", norm-matched")))
    if len(cells) < 2:
        return None
    ways = ("PGD", "PGD, norm-matched", "cPGD", "cPGD, norm-matched")
    figure, axes = figure_of(len(ways), width=3.2 * len(ways))
    rows = [["way", "training", "strength chosen", "gain at it", "gain at the demo's", "lost by it"]]
    answers = []
    for axis, way in zip(axes, ways, strict=True):
        kinds = {"split": "validation"}
        candidates = found.config.candidates(WAYS[way])
        by_cell = {
            length: {c: found.gain(name, way, strength=c, **kinds) for c in candidates if c is not None}
            for length, name in cells.items()
        }
        for colour, (length, gains) in zip(COLOURS, by_cell.items(), strict=False):
            course(axis, gains, colour, f"{length:g} times the training")
        axis.set_xscale("log", base=2)
        axis.set_xlabel(f"strength of {way}")
        axis.axhline(0, color=GREY, linewidth=1)
        usual = max(by_cell[1.0], key=lambda c: by_cell[1.0][c].mean)
        losses = []
        for length, name in cells.items():
            best = max(by_cell[length], key=lambda c: by_cell[length][c].mean)
            lost = found.gain(name, way, way, strength=usual, over_strength=best, **kinds)
            losses.append(lost.mean)
            at = by_cell[length]
            rows.append([way, f"{length:g}", f"{best:.3g}", str(at[best]), f"{usual:.3g}: {at[usual]}", str(lost)])
        answers.append(
            f"{way}: the strength that is best at the demo's training, {usual:.3g}, loses at most {-min(losses):.3f} "
            f"against the best of each length from {min(cells):g} to {max(cells):g} times it."
        )
    axes[0].set_ylabel("gain over base, validation prompts")
    axes[0].legend(frameon=False, fontsize=8)
    return Section(
        "One strength for any length of training",
        "A norm-matched strength is a share of what guidance by the prompt adds. Does one share fit modules that were "
        "trained for other lengths, where one w does not? Here strengths are compared by the mean alone.",
        answers,
        [rows],
        figure,
    )


def distance(found: Evidence) -> Section | None:
    """Question h: how w relates to how far a module was trained."""
    rows = [["cell", "method", "ratio, first half", "ratio, second half", "w chosen, by seed"]]
    points: dict[str, list[tuple[float, float]]] = {method: [] for method in CONTRASTIVE}
    for cell in found.config.cells:
        for name, of_method in points.items():
            ratios = found.found.get((cell.name, name, "trajectory", "change", "chosen"))
            if ratios is None:
                continue
            mean = np.mean([*ratios.values()], axis=0)
            early, late = mean[: len(mean) // 2].mean(), mean[len(mean) // 2 :].mean()
            rows.append([cell.name, name, f"{early:.3f}", f"{late:.3f}", found.strength(cell.name, name)])
            chosen = found.chosen[cell.name, name]
            of_method += [(float(ratios[seed].mean()), float(chosen[seed] or 0)) for seed in sorted(ratios)]
    if min(map(len, points.values())) < 3:
        return None
    figure, (axes,) = figure_of(1, width=5.5)
    answers = []
    for colour, (name, of_method) in zip(COLOURS, points.items(), strict=False):
        x, y = np.transpose(of_method)
        axes.plot(x, y, "o", color=colour, alpha=0.6, label=name)
        quartiles = np.quantile(x * y, [0.25, 0.5, 0.75])
        answers.append(
            f"{name}: over {len(x)} trainings the rank correlation of w and the ratio is "
            f"{rank_correlation(x, y):+.2f}; "
            f"their product has median {quartiles[1]:.2f}, quartiles {quartiles[0]:.2f} and {quartiles[2]:.2f}."
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("|contrast at w = 1| / |eps_base|, mean over the trajectory")
    axes.set_ylabel("w chosen")
    axes.legend(frameon=False)
    return Section(
        "Strength and length of training",
        "How does the strength that validation prompts choose relate to how far modules have moved from the base? The "
        "ratio is the length of the contrast at w = 1 over that of the base's prediction, step by step along the "
        "base's trajectory.",
        answers,
        [rows],
        figure,
    )


def online(found: Evidence) -> Section | None:
    """Methods that draw their own images, at equal numbers of scored images and of predictions."""
    cell = "online"
    names = [name for name in ONLINE if found.has(cell, f"{name}, {CALLS}", f"{name}, {PREDICTIONS}")]
    if len(names) < 2:
        return None
    (allowed,) = (each.budget for each in found.config.cells if each.name == cell and each.budget)
    figure, axes = figure_of(2, width=9.0, height=6.6, rows=2)
    kinds: tuple[Literal["calls", "predictions"], ...] = ("calls", "predictions")
    for column, x in enumerate(kinds):
        gained, learned_from = axes[column::2]
        for colour, name in zip(COLOURS, names, strict=False):
            spent, reward = (
                found.values(cell, f"{name}, {PREDICTIONS}", split="training", term=term).mean(axis=0)
                for term in (x, "reward")
            )
            costs = allowed.spent(ONLINE[name], x)
            ordered = sorted(costs, key=lambda each: costs[each])
            course(gained, {costs[each]: found.gain(cell, f"{name}, {each}") for each in ordered}, colour, name)
            parts = np.array_split(np.arange(len(reward)), min(20, len(reward)))
            learned_from.plot([spent[p].mean() for p in parts], [reward[p].mean() for p in parts], color=colour)
        gained.set_xscale("log")
        learned_from.set_xscale("log")
    for axis in axes[::2]:
        axis.set_xlabel("scored images")
    for axis in axes[1::2]:
        axis.set_xlabel("predicted images")
    axes[0].set_ylabel("gain over base, held-out prompts")
    axes[2].set_ylabel("judge's score in training")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    tables, answers = [], []
    for budget, of in ((CALLS, "scored images"), (PREDICTIONS, "predicted images")):
        rows = [[f"at equal numbers of {of}", "gain over base", "wins", "gain on training prompts", "spread of images"]]
        for name in names:
            way = f"{name}, {budget}"
            gains = str(found.gain(cell, way)), found.wins(cell, way).percent, str(found.gain(cell, way, split="train"))
            rows.append([name, *gains, str(found.gain(cell, way, term="spread"))])
        tables.append(rows)
        pairs = [("TailorPO", "D3PO"), ("TailorPO-G", "TailorPO"), ("TailorPO-G through UNet", "TailorPO-G")]
        pairs += [("TailorPO, updates inside", "TailorPO"), ("DiffusionNFT", "TailorPO")]
        answers += [
            f"At equal numbers of {of}: " + found.says(cell, f"{one}, {budget}", f"{other}, {budget}")
            for one, other in pairs
            if {one, other} <= set(names)
        ]
    return Section(
        "Online methods",
        "What do methods that draw their own images gain, with the judge as reward, on prompts that they did not draw? "
        "Learning rates were chosen on training prompts, with 20,000 predictions and one seed each: the next section. "
        "The lower panels have the score of what each step of training has learned from: whole images for D3PO, "
        "DDPO and DiffusionNFT, estimates of them from inside the trajectory for the others, so that heights compare "
        "within a method only.",
        answers,
        tables,
        figure,
    )


def offline(found: Evidence) -> Section | None:
    """Methods that learn from pairs, by the share of wrong labels."""
    cells = [cell.name for cell in found.config.cells if cell.name.startswith("offline, ")]
    names = [name for name in OFFLINE if cells and all(found.has(cell, "base", f"offline {name}") for cell in cells)]
    if len(names) < 2:
        return None
    labels = {cell: cell.removeprefix("offline, ") for cell in cells}
    figure, (axes,) = figure_of(1, width=7.0, height=0.9 + 0.44 * len(names))
    gains = [["gain over base", *labels.values(), f"lost by {labels[cells[-1]]}", "predictions"]]
    over = [["over DPO", *labels.values()]]
    strengths = [["strength", *labels.values()]]
    lost = {}
    for name in names:
        way = f"offline {name}"
        lost[name] = estimate(found.gains(cells[0], way, way, over_cell=cells[-1]))
        by_cell = [str(found.gain(cell, way)) for cell in cells]
        gains.append([name, *by_cell, str(lost[name]), str(predictions(found.config.demo, way))])
        if name != "DPO":
            over.append([name, *(str(found.gain(cell, way, "offline DPO")) for cell in cells)])
        if WAYS[way].strengths:
            strengths.append([name, *(found.strength(cell, way) for cell in cells)])
    for place, (colour, cell) in enumerate(zip(COLOURS, cells, strict=False)):
        by_name = {name: found.gain(cell, f"offline {name}") for name in names}
        bars(axes, by_name, colour, labels[cell], 0.2 * (place - (len(cells) - 1) / 2))
    axes.set_xlabel("gain over base, held-out prompts: mean and 95 % interval")
    axes.legend(frameon=False, fontsize=8)
    answers = [_where(found, labels, f"offline {name}", "offline DPO") for name in names if name != "DPO"]
    hurt = [f"{name} {value}" for name, value in lost.items() if value.sign > 0]
    answers.append(f"Methods that {labels[cells[-1]]} cost something: {'; '.join(hurt) or 'none'}.")
    return Section(
        "Methods that learn from pairs",
        "What do methods that learn from pairs gain, and what do wrong labels cost them? All have the same pairs, "
        "equally many steps, learning rates chosen on training prompts with as many steps for each rate (the next "
        "section), and the rule that they were published with. Labels are wrong where they disagree with the judge.",
        answers,
        [table for table in (gains, over, strengths) if len(table) > 1],
        figure,
    )


def learning_rates(
    title: str, question: str, cell: str, arms: Mapping[str, tuple[str, Sequence[float], float]]
) -> Callable[[Evidence], Section | None]:
    """A section about how the learning rates of methods were chosen.

    Args:
        title: of the section.
        question: that it answers.
        cell: whose ways are a method's name with a rate.
        arms: by a method's name: what its ways begin with, the rates that were tried, and the one that was chosen.
    """

    def section(found: Evidence) -> Section | None:
        def ways(name: str) -> dict[float, str]:
            way, rates, _ = arms[name]
            return {rate: f"{way}, rate {rate:g}" for rate in sorted(rates)}

        names = [name for name in arms if found.has(cell, *ways(name).values())]
        if not names:
            return None
        figure, (axis,) = figure_of(1, width=7.5)
        tried = sorted({rate for name in names for rate in arms[name][1]})
        rows = [["gain on training prompts", *(f"rate {rate:g}" for rate in tried), "chosen"]]
        ends = []
        for number, name in enumerate(names):
            gained = {rate: found.gain(cell, way, split="train") for rate, way in ways(name).items()}
            rows.append([name, *(str(gained.get(rate, "")) for rate in tried), f"{arms[name][2]:g}"])
            course(axis, gained, COLOURS[number % len(COLOURS)], name, "-" if number < len(COLOURS) else "--")
            if max(gained, key=lambda rate: gained[rate].mean) in (min(gained), max(gained)):
                ends.append(name)
        axis.set_ylim(bottom=max(axis.get_ylim()[0], LEAST_SHOWN))
        axis.set_xscale("log")
        axis.set_xlabel("learning rate")
        axis.set_ylabel("gain over base, training prompts")
        figure.legend(loc="outside right center", frameon=False, fontsize=8)
        said = f"At an end of the rates, whose best may lie beyond: {', '.join(ends) or 'none'}."
        return Section(title, question, [said], [rows], figure)

    return section


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, with mean ranks for ties."""

    def ranks(values: np.ndarray) -> np.ndarray:
        ordered = np.sort(values)
        return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


QUESTIONS: tuple[Callable[[Evidence], Section | None], ...] = (
    side_by_side,
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
        "Supervised on winners and losers, DPO and DPO with swapped labels, CHATS, or one network with SNPO? And LoRA "
        "or all weights?",
        ("cPGD", "cPGD of a DPO pair", "CHATS", "SNPO", "cPGD, full weights"),
        (("cPGD of a DPO pair", "cPGD"), ("CHATS", "cPGD"), ("SNPO", "cPGD"), ("cPGD, full weights", "cPGD")),
    ),
    roles,
    merging,
    terms,
    trajectory,
    versus(
        "Presets",
        "What do the presets keep of what cPGD gains, at which price in predictions?",
        ("cPGD", "cPGD, merged", "cPGD, prompt only", "preset light", "preset late"),
        (("cPGD, merged", "cPGD"), ("cPGD, prompt only", "cPGD"), ("preset light", "cPGD"), ("preset late", "cPGD")),
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
    one_strength,
    distance,
    offline,
    learning_rates(
        "Learning rates of methods that learn from pairs",
        "Which learning rate does each method take? Where the best of four was at an end, more were tried.",
        "offline tuning",
        {
            name: (f"offline {name}", (*OFFLINE_RATES, *MORE_RATES.get(name, ())), arm.learning_rate)
            for name, arm in OFFLINE.items()
        },
    ),
    online,
    learning_rates(
        "Learning rates of online methods",
        "Which learning rate does each method take? Where the best of three was at an end, more were tried.",
        "online tuning",
        {name: (name, arm.rates, arm.learning_rate) for name, arm in ONLINE.items()},
    ),
)
