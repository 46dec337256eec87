"""When does contrastive guidance pay? A grid of trainings on the demo world, cell by cell.

    python -m train.study configs/demo/study.py

A cell is one set of pairs, the modules that are trained on it, and what is drawn with them: validation prompts at every
candidate strength, of which one is chosen, held-out prompts, and prompts of the training pairs. All that is measured
goes into one table, `measurements.parquet`: a row for each quantity of each way to draw, with its value for every
prompt. What is in the table is not computed again. `demo.questions` and `demo.evidence` make the page
of it.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flax_pref.checkpoints.modules import Guided, load_modules, merge_modules
from flax_pref.config import check_least
from flax_pref.data.prepared import Records
from flax_pref.demo.experiment import EVALUATION_SEED, VALIDATION_SEED, Demo, DemoConfig, ModuleTraining
from flax_pref.demo.online import CALLS, ONLINE, PREDICTIONS, Budget, OnlineArm, curve, train_online
from flax_pref.demo.report import Sweep
from flax_pref.diffusion.guidance import Rule, Schedule, cfg, chats, cpgd, cpgd_conditional, merge_weights, npo, pgd
from flax_pref.diffusion.sampler import draw_normal, image_keys
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.shaping import length
from flax_pref.diffusion.solvers import no_history, step
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.files import replacing
from flax_pref.methods import (
    CHATS,
    DMPO,
    DSPO,
    KTO,
    NPO,
    SDPO,
    SNPO,
    DiffusionDPO,
    MaPO,
    Method,
    PositiveNegative,
    PositiveNegativeDPO,
)
from flax_pref.training.networks import Weights
from flax_pref.world import scenes as world

# ----------------------------------------------------------------------------------------------------------------------
# What is trained and drawn


class Arm(NamedTuple):
    """What is trained on the pairs of a cell.

    Attributes:
        method: of the settings of the demo.
        training: likewise, how long and how fast.
        weights: adapters, or networks of their own.
    """

    method: Callable[[DemoConfig], Method]
    training: Callable[[DemoConfig], ModuleTraining]
    weights: Weights = "lora"


ARMS = {
    "dpo": Arm(lambda c: DiffusionDPO(beta=c.beta), lambda c: c.dpo),
    "sft": Arm(lambda c: PositiveNegative(), lambda c: c.positive_negative),
    "dpo pair": Arm(lambda c: PositiveNegativeDPO(beta=c.beta), lambda c: c.dpo),
    "chats": Arm(lambda c: CHATS(), lambda c: c.positive_negative),
    "sft, full weights": Arm(
        lambda c: PositiveNegative(),
        lambda c: dataclasses.replace(c.positive_negative, learning_rate=c.positive_negative.learning_rate / 5),
        "full",
    ),
    "snpo": Arm(lambda c: SNPO(beta=c.beta), lambda c: dataclasses.replace(c.dpo, caption_dropout=0.0)),
}


class Way(NamedTuple):
    """A way to draw images.

    Attributes:
        arm: whose modules it takes; None: only the base.
        rule: of a strength and the guidance scale of the demo.
        strengths: its candidates: "w" of the study, "scales" of the demo's tuned CFG, or none: "".
        times: what these are multiplied by. The contrast of the prompt alone is not multiplied by s, as that of cPGD
            is, and a share of what guidance adds is another number.
        merged: whether the modules are merged into the weights.
        steps: how many times the steps of the demo it takes.
        best_of: how many images of a prompt it draws, to keep that which the judge likes best.
        budget: that a method which trains online used for its modules, see `demo.online`; "" for others.
        rate: learning rate of the modules (default: the arm's own).
    """

    arm: str | None
    rule: Callable[[Any, float], Rule]
    strengths: str = ""
    times: float = 1.0
    merged: bool = False
    steps: int = 1
    best_of: int = 1
    budget: str = ""
    rate: float | None = None


EARLY, LATE = (0.0, 0.5), (0.5, 1.0)
PROMPT_ONLY, SHARE = 3.0, 1 / 8  # see `Way.times`; the first is the demo's s


def _within(strength: float, part: tuple[float, float]) -> Schedule:
    return Schedule((strength,), start=part[0], stop=part[1])


def _share(strength: float) -> Schedule:
    return Schedule((strength,), norm=True)


WAYS = {
    "base": Way(None, lambda w, s: cfg(s)),
    "tuned CFG": Way(None, lambda w, s: cfg(w), "scales"),
    "CFG, 3 times the steps": Way(None, lambda w, s: cfg(s), steps=3),
    "base, best of 3": Way(None, lambda w, s: cfg(s), best_of=3),
    "DPO": Way("dpo", lambda w, s: cfg(s, "dpo")),
    "DPO, tuned CFG": Way("dpo", lambda w, s: cfg(w, "dpo"), "scales"),
    "PGD": Way("dpo", pgd, "w"),
    "PGD, merged": Way("dpo", pgd, "w", merged=True),
    "cPGD": Way("sft", cpgd, "w"),
    "cPGD, merged": Way("sft", cpgd, "w", merged=True),
    "pos - base": Way("sft", lambda w, s: cpgd(w, s, negative="base"), "w"),
    "base - neg": Way("sft", lambda w, s: cpgd(w, s, positive="base"), "w"),
    "cPGD, early": Way("sft", lambda w, s: cpgd(_within(w, EARLY), s), "w"),
    "cPGD, late": Way("sft", lambda w, s: cpgd(_within(w, LATE), s), "w"),
    "cPGD, prompt only": Way("sft", cpgd_conditional, "w", PROMPT_ONLY),
    "preset light": Way("sft", lambda w, s: cpgd_conditional(w, s, every=5, between="extrapolate"), "w", PROMPT_ONLY),
    "preset late": Way("sft", lambda w, s: cpgd_conditional(_within(w, LATE), _within(s, EARLY)), "w", PROMPT_ONLY),
    "cPGD, norm-matched": Way("sft", lambda w, s: cpgd(_share(w), s), "w", SHARE),
    "PGD, norm-matched": Way("dpo", lambda w, s: pgd(_share(w), s), "w", SHARE),
    "cPGD, capped": Way("sft", lambda w, s: cpgd(w, s, shaping="cap:0.5"), "w"),
    "cPGD, orthogonal": Way("sft", lambda w, s: cpgd(w, s, shaping="orthogonal"), "w"),
    "cPGD of a DPO pair": Way("dpo pair", cpgd, "w"),
    "CHATS": Way("chats", lambda w, s: chats(w), "scales"),
    "SNPO": Way("snpo", lambda w, s: cfg(w, "snpo"), "scales"),
    "cPGD, full weights": Way("sft, full weights", cpgd, "w"),
}


def online_way(name: str, budget: str, rate: float | None = None) -> Way:
    """Guidance by the prompt, with the module of a method that trains online."""
    (module,) = ONLINE[name].method.modules
    return Way(name, lambda w, s: cfg(s, module), budget=budget, rate=rate)


WAYS |= {f"{name}, {budget}": online_way(name, budget) for name in ONLINE for budget in (CALLS, PREDICTIONS)}


class OfflineArm(NamedTuple):
    """How a method that learns from pairs is compared with others, all on the same number of pairs.

    Attributes:
        method: of the settings of the demo.
        rule: of a strength and the guidance scale, as published.
        strengths: see `Way`.
        learning_rate: the best of `OFFLINE_RATES` and `MORE_RATES` on training prompts, see the cell "offline tuning".
        caption_dropout: share of prompts that are replaced by the empty one.
    """

    method: Callable[[DemoConfig], Method]
    rule: Callable[[Any, float], Rule]
    strengths: str = ""
    learning_rate: float = 5e-4
    caption_dropout: float = 0.2


OFFLINE_RATES = (1.5e-4, 5e-4, 1.5e-3, 4.5e-3)
# Where the best of these is the last or the first.
MORE_RATES = {"DPO": (1.35e-2,), "SNPO": (1.35e-2,), "MaPO": (5e-5,), "positive and negative": (5e-5,)}
OFFLINE = {
    "DPO": OfflineArm(lambda c: DiffusionDPO(beta=c.beta), lambda w, s: cfg(s, "dpo"), learning_rate=4.5e-3),
    "Poly-DPO": OfflineArm(
        lambda c: DiffusionDPO(beta=c.beta, poly_alpha=8.0), lambda w, s: cfg(s, "dpo"), learning_rate=1.5e-3
    ),
    "SDPO": OfflineArm(lambda c: SDPO(beta=c.beta, mu=0.9), lambda w, s: cfg(s, "sdpo"), learning_rate=1.5e-3),
    "DSPO": OfflineArm(lambda c: DSPO(), lambda w, s: cfg(s, "dspo")),
    "DMPO": OfflineArm(lambda c: DMPO(beta=c.beta), lambda w, s: cfg(s, "dmpo"), learning_rate=1.5e-3),
    "KTO": OfflineArm(lambda c: KTO(beta=c.beta), lambda w, s: cfg(s, "kto"), learning_rate=1.5e-3),
    "MaPO": OfflineArm(lambda c: MaPO(), lambda w, s: cfg(s, "mapo"), learning_rate=1.5e-4),
    "NPO": OfflineArm(lambda c: NPO(beta=c.beta), lambda w, s: npo(w, positive="base"), "scales", learning_rate=1.5e-3),
    "CHATS": OfflineArm(lambda c: CHATS(), lambda w, s: chats(w), "scales"),
    "SNPO": OfflineArm(
        lambda c: SNPO(beta=c.beta), lambda w, s: cfg(w, "snpo"), "scales", learning_rate=4.5e-3, caption_dropout=0.0
    ),
    "positive and negative": OfflineArm(lambda c: PositiveNegative(), cpgd, "w", learning_rate=1.5e-4),
}


def _offline_training(arm: OfflineArm) -> Callable[[DemoConfig], ModuleTraining]:
    changed = {"learning_rate": arm.learning_rate, "caption_dropout": arm.caption_dropout}
    return lambda config: dataclasses.replace(config.dpo, **changed)


def offline_way(name: str, rate: float | None = None) -> Way:
    """The rule of a method that learns from pairs, with its modules."""
    return Way(f"offline {name}", OFFLINE[name].rule, OFFLINE[name].strengths, rate=rate)


ARMS |= {f"offline {name}": Arm(arm.method, _offline_training(arm)) for name, arm in OFFLINE.items()}
WAYS |= {f"offline {name}": offline_way(name) for name in OFFLINE}
TUNING = {
    f"{name}, rate {rate:g}": online_way(name, PREDICTIONS, rate) for name, arm in ONLINE.items() for rate in arm.rates
}
OFFLINE_TUNING = {
    f"offline {name}, rate {rate:g}": offline_way(name, rate)
    for name in OFFLINE
    for rate in (*OFFLINE_RATES, *MORE_RATES.get(name, ()))
}
WAYS |= TUNING | OFFLINE_TUNING
QUICK = (
    "base",
    "tuned CFG",
    "DPO",
    "DPO, tuned CFG",
    "PGD",
    "cPGD",
    "cPGD, merged",
)  # what a run that only shows the path draws

VARIED = ("pairs", "generators", "label_temperature", "images", "unique_roles")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A set of pairs, how long modules train on it, and how images are drawn with them.

    What is None is as in the demo.
    """

    name: str
    pairs: int | None = None
    generators: tuple[str, ...] | None = None
    label_temperature: float | None = None
    images: int | None = None
    unique_roles: bool | None = None
    training: float = 1.0
    """How many times the demo's steps modules are trained for."""
    ways: tuple[str, ...]
    """How images are drawn: names in `WAYS`."""
    held_out_prompts: int
    budget: Budget | None = None
    """Of methods that train online."""
    seeds: int | None = None
    """How many of the study's seeds (default: all)."""
    every_strength: tuple[str, ...] = ()
    """Ways by which held-out prompts are drawn at every candidate strength, not only at the one chosen."""

    def __post_init__(self):
        check_least(self, 2, "held_out_prompts")
        if unknown := {*self.ways, *self.every_strength} - set(WAYS):
            raise ValueError(f"cell {self.name!r}: no way {sorted(unknown)[0]!r}; expected {', '.join(WAYS)}")
        if self.budget is None and any(WAYS[way].budget for way in self.ways):
            raise ValueError(f"cell {self.name!r}: has methods that train online; expected a budget of them")
        if "base" not in self.ways:
            raise ValueError(f"cell {self.name!r}: expected 'base' among its ways, which the others are compared with")

    def applied_to(self, config: DemoConfig) -> DemoConfig:
        """The settings of the demo with those of the cell."""

        def longer(training: ModuleTraining) -> ModuleTraining:
            return dataclasses.replace(training, steps=max(1, round(self.training * training.steps)))

        given = {name: getattr(self, name) for name in VARIED}
        return dataclasses.replace(
            config,
            **{name: value for name, value in given.items() if value is not None},
            held_out_prompts=self.held_out_prompts,
            dpo=longer(config.dpo),
            positive_negative=longer(config.positive_negative),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Measures a grid of trainings and ways to draw on the demo world, and writes a page of it."""

    output: Path = Path("runs/study")
    """Folder of the pairs and modules that a cell needs while it runs."""
    results: Path = Path("runs/study/evidence")
    """Folder of measurements.parquet, from which a run resumes, and of the figures; the page is beside it."""
    quick: bool = False
    """Run a part of the first cell, too little of it for the figures to mean anything."""
    only: tuple[str, ...] = ()
    """Cells to run (default: all that the table lacks)."""

    demo: DemoConfig
    """Settings that cells vary."""
    w: tuple[float, ...]
    """Candidate strengths of modules."""
    seeds: tuple[int, ...]
    """Training seeds: each has pairs, labels and modules of its own, and is compared on the same prompts and noise."""
    cells: tuple[Cell, ...]
    takes: str = ""
    """What the whole grid takes and on which machine, for the page, such as "it takes 5 hours on two CPU cores"."""

    def __post_init__(self):
        names = [cell.name for cell in self.cells]
        if len(set(names)) < len(names) or not names or not self.seeds or not self.w:
            raise ValueError("expected cells with a name of their own each, seeds, and candidates w")
        if unknown := set(self.only) - set(names):
            raise ValueError(f"only: no cell {sorted(unknown)[0]!r}; expected some of {', '.join(names)}")

    def seeds_of(self, cell: Cell) -> tuple[int, ...]:
        """Training seeds of a cell."""
        return self.seeds[: cell.seeds]

    def demo_of(self, cell: Cell, seed: int) -> DemoConfig:
        """The settings of a cell's training with one seed."""
        folder = re.sub(r"\W+", "_", f"{cell.name} {seed}")
        return dataclasses.replace(cell.applied_to(self.demo), output=self.output / folder, training_seed=seed)

    def candidates(self, way: Way) -> tuple[float | None, ...]:
        """Strengths that a way is drawn with on the validation prompts."""
        if not way.strengths:
            return (None,)
        values = self.w if way.strengths == "w" else self.demo.tuned_scales
        return tuple(way.times * value for value in values)

    def settings_of(self, cell: Cell) -> str:
        """SHA-256 of what a cell's measurements depend on, but for the seed."""
        settings = dataclasses.asdict(self.demo_of(cell, 0)) | {"w": self.w}
        if cell.budget is not None:
            settings["budget"] = cell.budget
        # Neither where files lie nor what the demo alone does.
        for name in ("output", "quick", "pairs_only", "w_pgd", "w_cpgd"):
            del settings[name]
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def shrunk(self) -> "StudyConfig":
        """A part of the first cell with little of everything, in a folder of its own."""
        return dataclasses.replace(
            self,
            output=self.output / "quick",
            results=self.output / "quick" / "evidence",
            demo=self.demo.shrunk(),
            w=self.w[:2],
            seeds=self.seeds[:1],
            cells=(dataclasses.replace(self.cells[0], pairs=32, training=1.0, held_out_prompts=4, ways=QUICK),),
        )


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


class Measurement(NamedTuple):
    """One quantity of one way to draw, a value for each prompt.

    Attributes:
        cell: its name.
        settings: SHA-256 of all that it depends on; a row of other settings does not count.
        seed: of training.
        way: its name.
        strength: w or guidance scale; None where there is none to choose.
        chosen: whether it is the strength that the validation prompts have chosen.
        split: of the prompts: "validation", "held_out" or "train"; "trajectory" for what sampling steps have,
            "training" for what training steps have.
        term: of the judge, such as "score"; "spread", see `spread`, "change", see `change`; of training, see
            `demo.online.curve`.
        values: `[N]`, or of each step.
    """

    cell: str
    settings: str
    seed: int
    way: str
    strength: float | None
    chosen: bool
    split: str
    term: str
    values: np.ndarray


SCHEMA = pa.schema(
    {
        "cell": pa.dictionary(pa.int32(), pa.string()),
        "settings": pa.dictionary(pa.int32(), pa.string()),
        "seed": pa.int32(),
        "way": pa.dictionary(pa.int32(), pa.string()),
        "strength": pa.float64(),
        "chosen": pa.bool_(),
        "split": pa.dictionary(pa.int32(), pa.string()),
        "term": pa.dictionary(pa.int32(), pa.string()),
        "values": pa.list_(pa.float32()),
    }
)
TABLE = "measurements.parquet"


def read_measurements(file: Path) -> list[Measurement]:
    """What the table holds; nothing where there is none yet."""
    if not file.exists():
        return []
    with pq.ParquetFile(file) as table:
        rows = table.read(use_threads=False).to_pylist()
    return [Measurement(**{**row, "values": np.array(row["values"], np.float32)}) for row in rows]


def write_measurements(rows: Sequence[Measurement], file: Path) -> None:
    """Writes the table; values are kept to four decimals, a fiftieth of the smallest interval that is told."""
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    columns["values"] = [np.round(values, 4) for values in columns["values"]]
    table = pa.table(columns, schema=SCHEMA)
    with replacing(file) as unfinished:
        pq.write_table(table, unfinished, compression="zstd", compression_level=19)


class Study:
    """The grid; `run` measures what the table lacks."""

    def __init__(self, config: StudyConfig):
        self.config = config
        self.table = config.results / TABLE
        read = read_measurements(self.table)
        settings = {cell.name: config.settings_of(cell) for cell in config.cells}
        self.rows = [row for row in read if row.settings == settings.get(row.cell)]
        if others := {(row.cell, row.seed) for row in read} - {(row.cell, row.seed) for row in self.rows}:
            print(f"{self.table}: {len(others)} trainings are of other settings than these, and are left out")

    def missing(self) -> list[tuple[Cell, int, list[str]]]:
        """Cells, training seeds, and the ways to draw that the table lacks; the base comes first."""
        done = {(row.cell, row.seed, row.way) for row in self.rows}
        found = []
        for cell in self.config.cells:
            chosen = not self.config.only or cell.name in self.config.only
            for seed in self.config.seeds_of(cell) if chosen else ():
                ways = [way for way in cell.ways if (cell.name, seed, way) not in done]
                if ways:
                    found.append((cell, seed, sorted(ways, key=lambda way: way != "base")))
        return found

    def run(self) -> list[Measurement]:
        """Measures cell by cell; each way to draw is in the table when it is done. Returns the whole table."""
        missing = self.missing()
        for i, (cell, seed, ways) in enumerate(missing, 1):
            print(f"cell {i} of {len(missing)}: {cell.name}, training seed {seed}")
            started = time.perf_counter()
            for rows in self.measure(cell, seed, ways):
                self.rows += rows
                write_measurements(self.rows, self.table)
            print(f"cell {i} of {len(missing)}: {time.perf_counter() - started:.0f} s")
        return self.rows

    def measure(self, cell: Cell, seed: int, ways: Sequence[str]) -> Iterator[list[Measurement]]:
        """Trains what these ways need and draws each; yields what was measured of each."""
        config = self.config.demo_of(cell, seed)
        config.output.mkdir(parents=True, exist_ok=True)
        demo = Demo(config)
        pairs = demo.read_back(demo.draw_pairs()) if any(WAYS[way].arm in ARMS for way in ways) else None
        modules: dict[Any, dict[str, Path]] = {(None, None, ""): {}}
        for name in ways:
            way = WAYS[name]
            if (way.arm, way.rate, way.budget) not in modules:
                trained = train_way(demo, way, pairs, cell.budget)
                modules |= {(way.arm, way.rate, budget): files for budget, files in trained.items()}
            measured = self.measure_way(demo, cell, name, modules[way.arm, way.rate, way.budget])
            common = (cell.name, self.config.settings_of(cell), seed, name)
            yield [Measurement(*common, *what) for what in measured]
        shutil.rmtree(config.output)

    def measure_way(self, demo: Demo, cell: Cell, name: str, files: Mapping[str, Path]) -> Iterator[tuple]:
        """What is measured of one way to draw: the last five of `Measurement`, one after another."""
        way = WAYS[name]
        candidates = self.config.candidates(way)
        draws = {strength: sampler(demo, way, files, strength) for strength in candidates}
        labels = {strength: name if strength is None else f"{name}, {strength:g}" for strength in candidates}
        tried = {w: drawn_terms(demo, way, draw, "validation", labels[w]) for w, draw in draws.items()}
        best = candidates[0]
        if len(candidates) > 1:
            scores = {strength: terms["score"] for strength, terms in tried.items() if strength is not None}
            base = self.validation_scores(cell, demo.config.training_seed)
            best = Sweep({name: scores}, {"base": base}, demo.config.choice).best(name)
        for strength, draw in draws.items():
            chosen, label = strength == best, labels[strength]
            found: dict[str, dict[str, np.ndarray]] = {"validation": tried[strength]}
            if chosen or name in cell.every_strength:
                found["held_out"] = drawn_terms(demo, way, draw, "held_out", label)
            if name in cell.every_strength:
                found["held_out"]["spread"] = spread(demo, draw, label)
            if chosen:
                found["train"] = drawn_terms(demo, way, draw, "train", label)
            if chosen and way.rule in (pgd, cpgd) and not way.merged:
                found["trajectory"] = {"change": change(demo, way, files)}
            if way.budget:
                found["training"] = curve(*online_run(demo, way))
            for split, terms in found.items():
                for term, values in terms.items():
                    yield strength, chosen, split, term, values

    def validation_scores(self, cell: Cell, seed: int) -> np.ndarray:
        """Of the base, which win rates are against."""
        key = (cell.name, seed, "base", "validation", "score")
        return next(row.values for row in self.rows if (row.cell, row.seed, row.way, row.split, row.term) == key)


def train_way(demo: Demo, way: Way, pairs: Records | None, budget: Budget | None) -> dict[str, dict[str, Path]]:
    """Modules that a way takes, each a file or a folder, by the name of the budget that they were trained with."""
    if way.budget:
        assert budget is not None  # see `Cell`
        output, online = online_run(demo, way)
        return train_online(demo, online, way.rate or online.learning_rate, budget, output)
    assert way.arm is not None and pairs is not None
    arm, config = ARMS[way.arm], demo.config
    training = arm.training(config)
    if way.rate is not None:
        training = dataclasses.replace(training, learning_rate=way.rate)
    seed = list(ARMS).index(way.arm)
    kinds = {"seed": seed, "weights": arm.weights}
    return {"": demo.train_modules(arm.method(config), training, pairs, run_folder(demo, way), **kinds)}


def run_folder(demo: Demo, way: Way) -> Path:
    """Where the modules of a way are trained."""
    return demo.config.output / re.sub(r"\W+", "_", f"{way.arm} {way.rate or ''}")


def online_run(demo: Demo, way: Way) -> tuple[Path, OnlineArm]:
    """Folder of a run that trains online, and what it trains."""
    assert way.arm is not None
    return run_folder(demo, way), ONLINE[way.arm]


SPLITS: dict[world.Split, int] = {"validation": VALIDATION_SEED, "held_out": EVALUATION_SEED, "train": EVALUATION_SEED}
SPREAD_PROMPTS, SPREAD_IMAGES = 64, 3

# (captions, number of the draw, text of the progress bar) -> images; the same number gives the same noise.
Draw = Callable[[Sequence[str], int, str], np.ndarray]


def sampler(demo: Demo, way: Way, files: Mapping[str, Path], strength: float | None) -> Draw:
    """Draws images at one strength, with the modules of these files."""
    config = demo.config
    rule = way.rule(strength, config.guidance_scale)
    guided = load_modules(demo.pipeline.unet, files)
    if way.merged:
        guided = Guided(merge_modules(demo.pipeline.unet, guided, merge_weights(rule)), {})
        rule = cfg(config.guidance_scale)
    draw = TextToImage(
        dataclasses.replace(demo.pipeline, unet=guided.base),
        solver_from_config(demo.pipeline.scheduler_config, way.steps * config.sampling_steps, name="ddim"),
        (world.RESOLUTION, world.RESOLUTION),
        config.batch_size,
        modules=guided.modules,
    )
    return lambda captions, number, label: draw(captions, rule=rule, seed=10 * config.seed + number, label=label)


def drawn_terms(demo: Demo, way: Way, draw: Draw, split: world.Split, label: str) -> dict[str, np.ndarray]:
    """What the judge says of the images of a split, `[N]` for each of its terms."""
    captions = demo.prompts(split, getattr(demo.config, f"{split}_prompts"))
    found: dict[str, np.ndarray] = {}
    for attempt in range(way.best_of):
        terms = demo.judged(draw(captions, SPLITS[split] + 1000 * attempt, f"{label}: {split}"), captions)
        better = terms["score"] > found["score"] if found else np.ones(len(captions), bool)
        found = {term: np.where(better, values, found.get(term, values)) for term, values in terms.items()}
    return found


def spread(demo: Demo, draw: Draw, label: str) -> np.ndarray:
    """How different images of a held-out prompt are, `[N]`: root mean square over pixels, mean over pairs of images."""
    captions = demo.prompts("held_out", min(SPREAD_PROMPTS, demo.config.held_out_prompts))
    drawn = [draw(captions, EVALUATION_SEED + 1000 * k, f"{label}: spread") for k in range(SPREAD_IMAGES)]
    distances = [
        np.sqrt(np.square(one - other).mean(axis=(1, 2, 3))) for one, other in itertools.combinations(drawn, 2)
    ]
    return np.mean(distances, axis=0)


def change(demo: Demo, way: Way, files: Mapping[str, Path]) -> np.ndarray:
    """How far modules are from the base: `|contrast| / |eps_base|` for the text, step by step along the base's
    trajectory, mean over validation prompts, `[S]`.

    The contrast is that of the way's rule at w = 1: `eps_dpo - eps_base` for PGD, `eps_pos - eps_neg` for cPGD.
    """
    config = demo.config
    rule = way.rule(1.0, 1.0)  # at s = 1 guidance is the prediction for the text
    captions = demo.prompts("validation", min(config.batch_size, config.validation_prompts))
    guided = load_modules(demo.pipeline.unet, files)
    draw = TextToImage(
        dataclasses.replace(demo.pipeline, unet=guided.base),
        demo.solver,
        (world.RESOLUTION, world.RESOLUTION),
        len(captions),
        modules=guided.modules,
    )
    vae = demo.pipeline.vae.config
    shape = (*(side // vae.downscale_factor for side in draw.size), vae.latent_channels)
    text, empty = draw.conditioning(captions, None)
    empty = jax.tree.map(lambda x, like: jnp.broadcast_to(x, like.shape), empty, text)
    (contrast,) = rule.terms(1.0)[1].values()
    shares = {name: share for (name, prompt), share in contrast.coefficients.items() if prompt == "text"}
    rows, weights = ("base", "base", *shares), np.array([*shares.values()], np.float32)
    texts = jax.tree.map(lambda x, y: jnp.stack([x, *[y] * (len(rows) - 1)], axis=1), empty, text)

    @jax.jit
    def advance(bank, row, latents, history):
        seen = jnp.stack([row.input_scale * latents] * len(rows), axis=1)
        predicted = bank(rows, seen, jnp.full(len(captions), row.timesteps), texts)
        moved = jnp.tensordot(predicted[:, 2:], weights, (1, 0))
        guided = predicted[:, 0] + config.guidance_scale * (predicted[:, 1] - predicted[:, 0])
        return step(latents, guided, row, None, history), (length(moved) / length(predicted[:, 1])).mean()

    latents = draw.solver.init_noise_sigma * draw_normal(
        image_keys(10 * config.seed + VALIDATION_SEED, range(len(captions))), 0, shape
    )
    history, ratios = no_history(draw.solver, latents), []
    for i in range(config.sampling_steps):
        row = jax.tree.map(lambda column, i=i: column[i], draw.solver)
        (latents, history), ratio = advance(draw.bank, row, latents, history)
        ratios.append(ratio)
    return np.array(ratios)
