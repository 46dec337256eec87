import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from flax_pref.demo.report import (
    MethodResult,
    Sweep,
    build_report,
    comparison_table,
    pictured,
    table,
    text_table,
    write_report,
)
from flax_pref.images.grid import CAPTION_WIDTH, GAP, MARGIN, TILE, image_grid

PROMPTS = 12
CAPTIONS = [f"prompt <{i}> & more words than fit on one line of the grid" for i in range(PROMPTS)]


def result(name, gain, w=None, *, predictions=20):
    rng = np.random.default_rng(0)
    scores, train_scores = 0.3 + 0.1 * rng.random((2, PROMPTS))
    return MethodResult(
        name, scores + gain, train_scores + gain, np.full((PROMPTS, 8, 8, 3), gain), predictions, 3.0, w
    )


@pytest.fixture
def results():
    dpo, cpgd = result("dpo", 0.1), result("cpgd", 0.3, 2.0, predictions=60)
    return [result("base", 0.0), dpo, result("pgd", 0.2, 1.5, predictions=40), cpgd]


@pytest.fixture
def sweep(results):
    scores = results[0].scores
    return Sweep(
        scores={
            "cfg": {2.0: scores - 0.1, 4.0: scores},
            "pgd": {1.0: scores, 1.5: scores + 1},
            "cpgd": {1.0: scores, 2.0: scores + 1, 3.0: scores - 1},
        },
        constant={"base": scores, "dpo": scores + 0.1},
    )


def test_the_report_holds_what_it_promises(results):
    report = build_report(results, 12.5)
    assert (report["prompts"], report["seconds"]) == (PROMPTS, 12.5)
    assert list(report["methods"]) == ["base", "dpo", "pgd", "cpgd"]
    cpgd = report["methods"]["cpgd"]
    compared = {"win_rate", "win_rate_ci", "gain", "gain_ci"}
    assert set(cpgd) == {"mean", "train_mean", "w", "guidance_scale", "predictions"} | compared
    assert not compared & set(report["methods"]["base"])
    assert (cpgd["predictions"], cpgd["guidance_scale"]) == (60, 3.0)
    assert cpgd["gain"] == pytest.approx(0.3) and cpgd["gain_ci"] == pytest.approx([0.3, 0.3])
    assert cpgd["win_rate"] == 1 and cpgd["w"] == 2.0
    assert report["methods"]["dpo"]["w"] is None
    assert report["comparisons"]["cpgd vs pgd"]["held_out"]["gain"] == pytest.approx(0.1)


def test_strengths_are_the_best_on_validation_prompts(sweep):
    assert (sweep.best("cfg"), sweep.best("pgd"), sweep.best("cpgd")) == (4.0, 1.5, 2.0)
    assert sweep.ends() == {"cfg": 4.0, "pgd": 1.5}, "others beyond may be better"


def test_the_largest_mean_is_chosen_among_strengths_that_win_about_as_often_as_any():
    base = np.zeros(100)
    strengths = {
        1.0: np.full(100, 0.1),  # wins always
        2.0: np.where(np.arange(100) < 99, 0.2, -0.1),  # nearly always, and by more
        4.0: np.where(np.arange(100) < 60, 1.0, -0.1),  # the largest mean, at the price of four losses in ten
    }
    sweep = Sweep(scores={"pgd": strengths}, constant={"base": base})
    assert sweep.best("pgd") == 1.0, "an interval without width"
    strengths[1.0][0] = -0.1
    assert sweep.best("pgd") == 2.0
    assert dataclasses.replace(sweep, choice="mean").best("pgd") == 4.0


def test_pictures_are_chosen_by_their_rank_in_the_gain():
    rng = np.random.default_rng(0)
    gained = rng.permutation(np.arange(101) / 100 - 0.5)
    shown = pictured(gained)
    assert [gained[i].round(2) for i in shown] == [0.41, 0.4, 0.39, 0.01, 0.0, -0.01, -0.39, -0.4]
    assert next(iter(shown.values())) == "upper decile, +0.41"
    few = pictured(np.array([0.3, 0.1, 0.2]))
    assert set(few) == {0, 1, 2}


def test_the_tables_print_every_method(results):
    report = build_report(results, 1.0)
    printed = text_table(table(report))
    assert re.search(
        r"^cPGD +3 +2 +60 +0\.\d{3} +0\.\d{3} +100\.0% +\[100\.0%, 100\.0%\] +\+0\.300", printed, re.MULTILINE
    )
    assert re.search(r"^cPGD over PGD +\+0\.100", text_table(comparison_table(report)), re.MULTILINE)


def test_the_written_report_is_self_contained_and_escaped(results, sweep, tmp_path):
    report = build_report(results, 1.0)
    write_report(report, results, sweep, CAPTIONS, tmp_path, title="a < b", scorer="score", settings={"x": "<y>"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "report.html", "report.json", "sweep.png"]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = (tmp_path / "report.html").read_text()
    assert "a &lt; b" in page and "&lt;y&gt;" in page and "<y>" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 2


def test_the_grid_shows_each_method_s_images_side_by_side(tmp_path):
    images = {"base": np.zeros((2, 8, 8, 3)), "cPGD": np.ones((2, 8, 8, 3)) * [1.0, 0.0, 0.0]}
    image_grid(images, CAPTIONS[:2], tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    left = MARGIN + CAPTION_WIDTH + GAP
    middle = grid.shape[0] - MARGIN - TILE // 2
    assert grid[middle, left + TILE // 2].tolist() == [0, 0, 0]
    assert grid[middle, left + TILE + GAP + TILE // 2].tolist() == [255, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
