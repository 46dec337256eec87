"""What cheaper guidance keeps of the gain, and what it costs, in the demo world."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from flax_pref.checkpoints.diffusers import Pipeline, load_pipeline
from flax_pref.checkpoints.modules import load_modules, merge_modules
from flax_pref.diffusion.conditioning import chunks
from flax_pref.diffusion.guidance import Rule, Schedule, cfg, cpgd, cpgd_conditional, merge_weights, tabulate
from flax_pref.diffusion.sampler import image_keys
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.evaluation.statistics import bootstrap_interval, gains
from flax_pref.world import judge
from flax_pref.world import scenes as world

VALIDATION_SEED, EVALUATION_SEED = 4, 3  # as in the demo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """Compares cheaper guidance with full cPGD in the demo world, by the judge's scores and by time."""

    modules: Path = Path("runs/demo")
    """Folder with pos.safetensors and neg.safetensors, e.g. of `make demo`."""
    steps: int = 10
    guidance_scale: float = 3.0
    validation_prompts: int = 64
    """To choose w on."""
    prompts: int = 256
    """Held out, to compare on."""
    batch_size: int = 32
    out: Path = Path("runs/tradeoff")
    """Folder for tradeoff.md and tradeoff.png."""
    json: Path | None = None
    """File for the figures."""


class Setting(NamedTuple):
    """A way to guide.

    Attributes:
        rule: of w and s.
        tuned: the setting whose w it takes.
        merged: whether the modules are merged into the weights.
    """

    rule: Callable[..., Rule]
    tuned: str
    merged: bool = False


FULL, CONDITIONAL, MERGED = "cPGD", "conditional-only", "merged weights"
CANDIDATES = {FULL: (2.0, 3.0, 4.0), CONDITIONAL: (4.0, 6.0, 8.0), MERGED: (2.0, 3.0, 4.0, 5.0)}  # for w


def reusing(rule: Callable, every: int, between: str) -> Callable:
    """The rule with its contrast predicted in every so many steps."""
    return lambda w, s: rule(w, s, every=every, between=between)


def within(rule: Callable, start: float, stop: float) -> Callable:
    """The rule with its contrast in a part of the trajectory."""
    return lambda w, s: rule(Schedule((w,), start=start, stop=stop), s)


SETTINGS = {
    FULL: Setting(cpgd, FULL),
    "cPGD, every 2, hold": Setting(reusing(cpgd, 2, "hold"), FULL),
    "cPGD, every 2, extrapolate": Setting(reusing(cpgd, 2, "extrapolate"), FULL),
    "cPGD, every 5, hold": Setting(reusing(cpgd, 5, "hold"), FULL),
    "cPGD, every 5, extrapolate": Setting(reusing(cpgd, 5, "extrapolate"), FULL),
    "cPGD, first half": Setting(within(cpgd, 0.0, 0.5), FULL),
    "cPGD, second half": Setting(within(cpgd, 0.5, 1.0), FULL),
    CONDITIONAL: Setting(cpgd_conditional, CONDITIONAL),
    "conditional-only, every 3, hold": Setting(reusing(cpgd_conditional, 3, "hold"), CONDITIONAL),
    "conditional-only, every 4, hold": Setting(reusing(cpgd_conditional, 4, "hold"), CONDITIONAL),
    "conditional-only, every 4, extrapolate": Setting(reusing(cpgd_conditional, 4, "extrapolate"), CONDITIONAL),
    "conditional-only, every 5, extrapolate": Setting(reusing(cpgd_conditional, 5, "extrapolate"), CONDITIONAL),
    MERGED: Setting(cpgd, MERGED, merged=True),
}


def bench_tradeoff(bench: Tradeoff) -> dict:
    """Gains on held-out prompts and times per image, all in one run."""
    base = load_pipeline("demo")
    guided = load_modules(base.unet, {name: bench.modules / f"{name}.safetensors" for name in ("pos", "neg")})
    adapted = dataclasses.replace(base, unet=guided.base)
    s = bench.guidance_scale

    def made(setting: Setting, w: float) -> tuple[Pipeline, Rule]:
        rule = setting.rule(w, s)
        if not setting.merged:
            return adapted, rule
        return dataclasses.replace(base, unet=merge_modules(base.unet, guided, merge_weights(rule))), cfg(s)

    validation = draw_in_turns(
        {"CFG": (base, cfg(s))}
        | {f"{name} {w:g}": made(SETTINGS[name], w) for name, ws in CANDIDATES.items() for w in ws},
        *("validation", bench.validation_prompts, VALIDATION_SEED, bench),
    )
    mean = {name: float(scores.mean()) for name, (scores, _) in validation.items()}
    w = {name: max(ws, key=lambda w, name=name: mean[f"{name} {w:g}"]) for name, ws in CANDIDATES.items()}
    found = draw_in_turns(
        {"CFG": (base, cfg(s))} | {name: made(setting, w[setting.tuned]) for name, setting in SETTINGS.items()},
        *("held_out", bench.prompts, EVALUATION_SEED, bench),
    )
    baseline, baseline_times = found["CFG"]
    whole = gains(found[FULL][0], baseline)
    rows = []
    for name, (scores, times) in found.items():
        gain = gains(scores, baseline)
        setting = SETTINGS.get(name)
        rule = cfg(s) if setting is None or setting.merged else setting.rule(1.0, s)
        rows.append(
            {
                "setting": name,
                "w": None if setting is None else w[setting.tuned],
                "predictions": tabulate(rule, bench.steps, 1).evaluations,
                "time": statistics.median(t / base for t, base in zip(times, baseline_times, strict=True)),
                "mean": float(scores.mean()),
                "gain": float(gain.mean()),
                "gain_ci": bootstrap_interval(gain) if setting else (0.0, 0.0),
                "kept": float(gain.mean() / whole.mean()),
                "kept_ci": _ratio_interval(gain, whole) if setting else (0.0, 0.0),
            }
        )
    figures = {
        **{"prompts": bench.prompts, "steps": bench.steps, "guidance_scale": s, "batch_size": bench.batch_size},
        **{"device": jax.devices()[0].device_kind, "jax": jax.__version__},
        **{"seconds_per_image_cfg": statistics.median(baseline_times) / bench.batch_size, "validation": mean},
        "settings": rows,
    }
    bench.out.mkdir(parents=True, exist_ok=True)
    (bench.out / "tradeoff.md").write_text(table(rows))
    plot(rows, bench.out / "tradeoff.png")
    print(table(rows))
    return figures


def draw_in_turns(
    methods: dict[str, tuple[Pipeline, Rule]], split: world.Split, count: int, seed: int, bench: Tradeoff
) -> dict[str, tuple[np.ndarray, list[float]]]:
    """Scores `[N]` and seconds of each batch under every method; batch by batch, so that a busy machine slows all."""
    captions = [scene.caption for scene in itertools.islice(world.scenes(split, 0), count)]
    asked, score = judge.question(captions), jax.jit(judge.score)
    drawers = {}
    for name, (pipeline, rule) in methods.items():
        solver = solver_from_config(pipeline.scheduler_config, bench.steps, name="ddim")
        draw = TextToImage(pipeline, solver, (world.RESOLUTION, world.RESOLUTION), bench.batch_size)
        drawers[name] = draw, tabulate(rule, len(solver.timesteps), bench.batch_size)
    scores, seconds = {name: [] for name in methods}, {name: [] for name in methods}
    batches = list(chunks(count, bench.batch_size))
    with tqdm(total=(1 + len(batches)) * len(methods), desc=f"{split} prompts", unit="batch") as progress:
        for number, (chosen, n) in enumerate([batches[0], *batches]):  # the first one once more, to compile
            texts, keys = [captions[i] for i in chosen], image_keys(seed, chosen)
            for name, (draw, table) in drawers.items():
                started = time.perf_counter()
                images = np.asarray(draw.draw(texts, keys, table))
                took = time.perf_counter() - started
                progress.update()
                if number:
                    seconds[name].append(took)
                    scored = score(images, judge.Question(*(column[chosen] for column in asked)))
                    scores[name].append(np.asarray(scored)[:n])
    return {name: (np.concatenate(scores[name]), seconds[name]) for name in methods}


def _ratio_interval(gain: np.ndarray, whole: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """Percentile bootstrap interval of `mean(gain) / mean(whole)`, 95 %, over prompts."""
    chosen = np.random.default_rng(0).integers(len(gain), size=(resamples, len(gain)))
    low, high = np.quantile(gain[chosen].mean(axis=1) / whole[chosen].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = ["| setting | w | predictions | time | gain over CFG | share of cPGD's gain |", "|---|---|---|---|---|---|"]
    for row in rows:
        guided = row["w"] is not None
        gain = f"{row['gain']:+.3f} [{row['gain_ci'][0]:+.3f}, {row['gain_ci'][1]:+.3f}]" if guided else ""
        kept = f"{row['kept']:.0%} [{row['kept_ci'][0]:.0%}, {row['kept_ci'][1]:.0%}]" if guided else ""
        w = f"{row['w']:g}" if guided else ""
        lines.append(f"| {row['setting']} | {w} | {row['predictions']} | {row['time']:.2f} | {gain} | {kept} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], file: Path) -> None:
    """Gain over time, with the gain and the time that are asked for."""
    figure = Figure(figsize=(10, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    whole = next(row["gain"] for row in rows if row["setting"] == FULL)
    axes.axhline(0.95 * whole, color="#999", linestyle="--", linewidth=1)
    axes.axvline(1.3, color="#999", linestyle="--", linewidth=1)
    axes.annotate("95 % of cPGD's gain", (2.6, 0.95 * whole), va="bottom", fontsize=8, color="#666")
    axes.annotate("1.3 x CFG", (1.3, 0), rotation=90, ha="right", va="bottom", fontsize=8, color="#666")
    colours = {FULL: "#1f77b4", CONDITIONAL: "#d95f02", MERGED: "#2ca02c"}
    shown = [row for row in rows if row["w"] is not None]
    by_time = sorted(range(len(shown)), key=lambda i: shown[i]["time"])
    for number, row in enumerate(shown):
        colour = colours[SETTINGS[row["setting"]].tuned]
        low, high = row["gain_ci"]
        error = [[row["gain"] - low], [high - row["gain"]]]
        axes.errorbar(row["time"], row["gain"], yerr=error, fmt="o", color=colour, capsize=2, linewidth=0.8)
        # Neighbours are named at opposite ends of their intervals, for many lie close to each other.
        end, aside = (high, 3) if by_time.index(number) % 2 else (low, -10)
        axes.annotate(
            str(number + 1), (row["time"], end), (0, aside), textcoords="offset points", ha="center", fontsize=8
        )
        axes.plot([], [], "o", color=colour, label=f"{number + 1}  {row['setting']}")
    axes.set_xlabel("time per image, plain CFG = 1")
    axes.set_ylabel("gain over plain CFG, judge's score")
    axes.set_xlim(0.85, 1.05 * max(row["time"] for row in rows))
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(file)
