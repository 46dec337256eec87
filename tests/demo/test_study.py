"""The study: its grid, its table, and a page that says what is in the table."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from flax_pref.config import shipped_config
from flax_pref.demo import study
from flax_pref.demo.evidence import Evidence, counted, predictions, write_page
from flax_pref.demo.online import BATCH, CALLS, ONLINE, PREDICTIONS, Budget
from flax_pref.demo.questions import QUESTIONS, rank_correlation
from flax_pref.demo.study import (
    MORE_RATES,
    OFFLINE,
    OFFLINE_RATES,
    WAYS,
    Cell,
    Measurement,
    Study,
    read_measurements,
    write_measurements,
)
from flax_pref.evaluation.statistics import crossed_interval

ROOT = Path(__file__).parents[2]
CONFIG = shipped_config("demo/study")
SETTINGS = {cell.name: CONFIG.settings_of(cell) for cell in CONFIG.cells}
PROMPTS = 40
TERMS = ("score", "found", "place", "background", "edges", "cleanness", "contrast", "composition")


def measured(cell, seed, way, gain, *, strength=None, chosen=True):
    """Rows of a way that gains so much on every prompt, up to noise."""
    rng = np.random.default_rng([seed, len(way)])
    for split in ("validation", "held_out", "train"):
        for term in TERMS:
            values = 0.5 + gain + 0.01 * rng.standard_normal(PROMPTS)
            yield Measurement(cell, SETTINGS[cell], seed, way, strength, chosen, split, term, values.astype(np.float32))


GAINS = {"base": 0.0, "tuned CFG": 0.02, "DPO": 0.1, "DPO, tuned CFG": 0.1, "PGD": 0.2, "cPGD": 0.1}


def rows_of(cell, seeds=(0, 1, 2), ways=GAINS):
    return [
        row
        for seed in seeds
        for name in ways
        for row in measured(cell, seed, name, GAINS.get(name, 0.15), strength=None if name in ("base", "DPO") else 2.0)
    ]


def test_an_interval_over_runs_and_prompts_is_that_of_a_loop():
    values = np.random.default_rng(0).normal(size=(3, 30)) + np.array([[0.0], [0.4], [1.0]])
    rng, means = np.random.default_rng(1), []
    for _ in range(4000):
        runs, prompts = rng.integers(3, size=3), rng.integers(30, size=30)
        means.append(values[np.ix_(runs, prompts)].mean())
    np.testing.assert_allclose(crossed_interval(values), np.quantile(means, [0.025, 0.975]), atol=0.04)
    # Runs that agree leave the interval over prompts.
    low, high = crossed_interval(np.tile(values[:1], (3, 1)))
    assert high - low == pytest.approx(2 * 1.96 * values[0].std() / np.sqrt(30), rel=0.05)


def test_the_table_keeps_what_was_measured(tmp_path):
    rows = rows_of("main", seeds=(4,))
    write_measurements(rows, tmp_path / study.TABLE)
    read = read_measurements(tmp_path / study.TABLE)
    assert [row[:-1] for row in read] == [row[:-1] for row in rows]
    np.testing.assert_allclose([row.values for row in read], [row.values for row in rows], atol=5.1e-5)
    assert read_measurements(tmp_path / "none.parquet") == []


def some(tmp_path, *names):
    """The study of some cells, of which two ways to draw are wanted."""
    cells = [dataclasses.replace(cell, ways=("DPO", "base")) for cell in CONFIG.cells if cell.name in names]
    return dataclasses.replace(CONFIG, output=tmp_path / "run", results=tmp_path / "evidence", cells=tuple(cells))


def test_what_is_in_the_table_is_not_computed_again(tmp_path, monkeypatch):
    config = some(tmp_path, "main", "64 pairs")
    (tmp_path / "evidence").mkdir()
    rows = rows_of("main", seeds=(0, 2), ways=("base", "DPO")) + rows_of("main", seeds=(1,), ways=("base",))
    write_measurements(rows, tmp_path / "evidence" / study.TABLE)
    asked = []

    def measure(self, cell, seed, ways):
        for way in ways:
            asked.append((cell.name, seed, way))
            if len(asked) == 3:
                raise KeyboardInterrupt
            yield rows_of(cell.name, seeds=(seed,), ways=(way,))

    monkeypatch.setattr(Study, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        Study(config).run()
    assert asked == [("main", 1, "DPO"), ("64 pairs", 0, "base"), ("64 pairs", 0, "DPO")]
    rows = Study(config).run()
    assert asked[3:5] == [("64 pairs", 0, "DPO"), ("64 pairs", 1, "base")]
    wanted = {(cell.name, seed, way) for cell in config.cells for seed in (0, 1, 2) for way in ("base", "DPO")}
    assert {(row.cell, row.seed, row.way) for row in rows} == wanted
    assert not Study(config).missing()


def test_measurements_of_other_settings_do_not_count(tmp_path, capsys):
    config = some(tmp_path, "main")
    (tmp_path / "evidence").mkdir()
    write_measurements(rows_of("main", ways=("base", "DPO")), tmp_path / "evidence" / study.TABLE)
    assert not Study(config).missing()
    moved = dataclasses.replace(config, output=tmp_path / "elsewhere")
    assert not Study(moved).missing() and not capsys.readouterr().out
    longer = dataclasses.replace(config, demo=dataclasses.replace(config.demo, beta=2 * config.demo.beta))
    assert len(Study(longer).missing()) == 3
    assert "3 trainings are of other settings than these, and are left out" in capsys.readouterr().out


def test_a_cell_changes_what_it_names_and_nothing_else():
    cell = Cell(name="x", pairs=64, training=0.5, ways=("base",), held_out_prompts=8)
    applied, demo = cell.applied_to(CONFIG.demo), CONFIG.demo
    assert (applied.pairs, applied.held_out_prompts) == (64, 8)
    assert applied.dpo.steps == demo.dpo.steps / 2
    assert applied.positive_negative.steps == demo.positive_negative.steps / 2
    assert (applied.generators, applied.label_temperature) == (demo.generators, demo.label_temperature)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cell(name="x", ways=("base", "cPDG"), held_out_prompts=8), "no way 'cPDG'; expected base, "),
        (lambda: Cell(name="x", ways=("DPO",), held_out_prompts=8), "expected 'base' among its ways"),
        (lambda: dataclasses.replace(CONFIG, cells=CONFIG.cells[:1] * 2), "cells with a name of their own"),
        (lambda: dataclasses.replace(CONFIG, only=("mian",)), "no cell 'mian'; expected some of main, "),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_page_says_what_the_intervals_say_and_leaves_out_what_is_missing(tmp_path):
    config = dataclasses.replace(CONFIG, results=tmp_path / "evidence")
    config.results.mkdir()
    rows = rows_of("main") + rows_of("64 pairs") + rows_of("4096 pairs", seeds=(0,))
    page = write_page(rows, config, QUESTIONS, "make study").read_text()
    assert "- PGD scores higher than DPO: +0.1" in page
    assert "- Between cPGD and DPO no difference is shown: " in page
    assert "- cPGD scores lower than PGD: -0.1" in page
    cost = 4 * config.demo.sampling_steps
    assert re.search(
        rf"^\| PGD \| 2, 2, 2 \| {cost} \| \+0\.\d{{3}} \[\+0\.\d{{3}}, \+0\.\d{{3}}\] \| 100% ", page, re.MULTILINE
    )
    assert "7 of 56 trainings" in page
    assert "| number of pairs | 64 |" in page and "| number of pairs | 4096 |" in page
    assert "- PGD scores higher than DPO: 64 pairs, as in the demo, 4096 pairs." in page
    assert "leaves out what is missing" in page
    assert "Where on the trajectory" not in page, "cPGD, early has not been measured"
    figures = re.findall(r"!\[.*?\]\(evidence/(\w+\.png)\)", page)
    assert figures and all((config.results / figure).is_file() for figure in figures)


def test_merging_is_compared_at_equal_strength(tmp_path):
    config = dataclasses.replace(CONFIG, results=tmp_path / "evidence", w=(1.0, 2.0, 3.0, 4.0, 6.0))
    config.results.mkdir()
    rows = rows_of("main", ways=("base",))
    for method in ("PGD", "cPGD"):
        for w in config.w:  # merging costs more, the larger w is, and nothing at w = 1
            kinds = {"chosen": w == 2.0, "strength": w}
            rows += [row for seed in (0, 1) for row in measured("main", seed, method, 0.1, **kinds)]
            lost = 0.1 - 0.05 * (w - 1)
            rows += [row for seed in (0, 1) for row in measured("main", seed, f"{method}, merged", lost, **kinds)]
    page = write_page(rows, config, QUESTIONS, "make study").read_text()
    assert "- PGD, 1 times the demo's training: merging scores lower at w = 2, 3, 4, 6. Each " in page
    assert re.search(r"^\| cPGD \| 1 \| [+-]0\.00\d \[.*?\] \| -0\.05", page, re.MULTILINE)


def test_online_methods_are_compared_at_equal_budgets(tmp_path):
    config = dataclasses.replace(CONFIG, results=tmp_path / "evidence")
    config.results.mkdir()
    rows = rows_of("online", ways=("base",))
    rows += [
        Measurement("online", SETTINGS["online"], seed, "base", None, True, "held_out", "spread", np.full(PROMPTS, 0.3))
        for seed in (0, 1, 2)
    ]
    for name, gain in (("TailorPO", 0.25), ("D3PO", 0.1)):
        for budget in (CALLS, PREDICTIONS):
            for seed in (0, 1, 2):
                way = f"{name}, {budget}"
                rows += measured("online", seed, way, gain)
                common = ("online", SETTINGS["online"], seed, way, None, True)
                rows.append(Measurement(*common, "held_out", "spread", np.full(PROMPTS, 0.25)))
                rows += [
                    Measurement(*common, "training", term, np.linspace(1, 2, 5))
                    for term in ("reward", "calls", "predictions")
                ]
    page = write_page(rows, config, QUESTIONS, "make study").read_text()
    assert (
        'At equal numbers of scored images: "TailorPO, equal calls" scores higher than "D3PO, equal calls": +0.1'
        in page
    )
    assert re.search(r"^\| D3PO \| \+0\.\d+ \[.*-0\.050 \[-0\.050, -0\.050\] \|$", page, re.MULTILINE)


def test_methods_that_learn_from_pairs_are_compared_at_each_share_of_wrong_labels(tmp_path):
    config = dataclasses.replace(CONFIG, results=tmp_path / "evidence")
    config.results.mkdir()
    rows = []
    for cell, hurt in (("no wrong labels", 0.0), ("10 % wrong labels", 0.1), ("30 % wrong labels", 0.2)):
        for seed in (0, 1, 2):
            for way, gain in (("base", 0.0), ("offline DPO", 0.25 - hurt), ("offline Poly-DPO", 0.2)):
                rows += measured(f"offline, {cell}", seed, way, gain)
    page = write_page(rows, config, QUESTIONS, "make study").read_text()
    assert (
        "- offline Poly-DPO scores higher than offline DPO: 10 % wrong labels, 30 % wrong labels; "
        "scores lower than offline DPO: no wrong labels." in page
    )
    assert re.search(r"^- Methods that 30 % wrong labels cost something: DPO \+0\.(20|19)\d \[\S+ \S+\]\.$", page, re.M)
    assert "| strength | no wrong labels |" not in page  # neither has one


def test_the_learning_rates_of_methods_that_learn_from_pairs_are_those_that_the_measurements_choose():
    found = Evidence(read_measurements(ROOT / "docs" / "evidence" / study.TABLE), CONFIG)
    for name, arm in OFFLINE.items():
        rates = (*OFFLINE_RATES, *MORE_RATES.get(name, ()))
        gains = {r: found.gain("offline tuning", f"offline {name}, rate {r:g}", split="train").mean for r in rates}
        assert arm.learning_rate == max(gains, key=lambda rate: gains[rate])


@pytest.mark.parametrize("name", ONLINE)
def test_a_budget_pays_for_the_same_number_of_scored_images_and_of_predictions(name):
    arm, budget = ONLINE[name], Budget(2_000, 60_000)
    cost, steps = arm.method.cost(within=arm.within), budget.steps(arm)
    assert steps[CALLS] * BATCH * cost.rewards == pytest.approx(2_000, rel=0.04)
    assert steps[PREDICTIONS] * BATCH * cost.predictions == pytest.approx(60_000, rel=0.01)


def test_the_learning_rates_of_online_methods_are_those_that_the_measurements_choose():
    found = Evidence(read_measurements(ROOT / "docs" / "evidence" / study.TABLE), CONFIG)
    for name, arm in ONLINE.items():
        ways = {rate: f"{name}, rate {rate:g}" for rate in arm.rates}
        if found.has("online tuning", *ways.values()):
            gains = {rate: found.gain("online tuning", way, split="train").mean for rate, way in ways.items()}
            assert arm.learning_rate == max(gains, key=lambda rate: gains[rate])


def test_a_training_that_is_not_finished_waits_for_the_others_of_its_cell_to_count():
    config = dataclasses.replace(CONFIG, cells=(Cell(name="main", ways=("base", "DPO"), held_out_prompts=8),))
    whole, part = rows_of("main", seeds=(0,), ways=("base", "DPO")), rows_of("main", seeds=(1,), ways=("base",))
    assert counted(part, config) == part
    assert counted(whole + part, config) == whole


def test_a_seed_that_has_one_of_two_ways_does_not_count():
    rows = rows_of("main", seeds=(0, 1)) + rows_of("main", seeds=(2,), ways=("base", "DPO"))
    found = Evidence(rows, CONFIG)
    assert found.gains("main", "DPO").shape == (3, PROMPTS)
    assert found.gains("main", "PGD").shape == found.gains("main", "PGD", "DPO").shape == (2, PROMPTS)
    assert found.gap("main", "PGD").mean == pytest.approx(0.0, abs=0.01)


def test_a_choice_at_an_end_of_the_candidates_is_marked():
    rows = rows_of("main", seeds=(0,))
    ends = {1: min(CONFIG.w), 2: max(CONFIG.w)}
    for seed, w in ends.items():
        rows += measured("main", seed, "PGD", 0.1, strength=w)
    assert Evidence(rows, CONFIG).strength("main", "PGD") == "2, ≤ 0.5, ≥ 6"


def test_a_gap_is_between_the_gains_of_two_splits():
    found = Evidence(rows_of("main"), CONFIG)
    gap = found.gap("main", "PGD")
    ours = found.values("main", "PGD", split="train") - found.values("main", "base", split="train")
    assert gap.mean == pytest.approx(ours.mean() - found.gain("main", "PGD").mean, abs=1e-6)
    assert gap.low < 0 < gap.high


def test_ranks_of_ties_are_their_mean():
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 1.0, 2.0, 2.0])
    # Spearman's coefficient with ranks 1, 2, 3, 4 and 1.5, 1.5, 3.5, 3.5.
    assert rank_correlation(x, y) == pytest.approx(4 / np.sqrt(5 * 4))


def test_an_estimate_is_of_the_same_prompts_and_seeds():
    found = Evidence(rows_of("main"), CONFIG)
    gained = found.gain("main", "PGD")
    assert gained.mean == pytest.approx(0.2, abs=0.005) and gained.low < gained.mean < gained.high
    assert found.wins("main", "PGD").mean == 1.0


def test_every_drawing_is_priced():
    priced = {name: predictions(CONFIG.demo, name) for name in WAYS}
    steps = CONFIG.demo.sampling_steps
    assert priced["base"] == priced["PGD, merged"] == 2 * steps
    assert priced["CFG, 3 times the steps"] == priced["base, best of 3"] == priced["cPGD"] == 6 * steps
    assert priced["cPGD, early"] == 4 * steps
    assert priced["cPGD, capped"] == priced["cPGD, norm-matched"] == 6 * steps
