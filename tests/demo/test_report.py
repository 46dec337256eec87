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
    table,
    text_table,
    write_report,
)
from flax_pref.images.grid import CAPTION_WIDTH, GAP, MARGIN, TILE, image_grid

PROMPTS = 12
CAPTIONS = [f"prompt <{i}> & more words than fit on one line of the grid" for i in range(PROMPTS)]


def result(name, gain, w=None):
    rng = np.random.default_rng(0)
    scores, train_scores = 0.3 + 0.1 * rng.random((2, PROMPTS))
    return MethodResult(name, scores + gain, train_scores + gain, np.full((PROMPTS, 8, 8, 3), gain), w)


@pytest.fixture
def results():
    return [result("base", 0.0), result("dpo", 0.1), result("pgd", 0.2, 1.5), result("cpgd", 0.3, 2.0)]


@pytest.fixture
def sweep(results):
    scores = results[0].scores
    return Sweep(
        scores={"pgd": {1.0: scores, 1.5: scores + 1}, "cpgd": {1.0: scores, 2.0: scores + 1, 3.0: scores - 1}},
        constant={"base": scores, "dpo": scores + 0.1},
    )


def test_the_report_holds_what_it_promises(results):
    report = build_report(results, 12.5)
    assert (report["prompts"], report["seconds"]) == (PROMPTS, 12.5)
    assert list(report["methods"]) == ["base", "dpo", "pgd", "cpgd"]
    cpgd = report["methods"]["cpgd"]
    assert set(cpgd) == {"mean", "train_mean", "win_rate", "win_rate_ci", "gain", "gain_ci", "w"}
    assert cpgd["gain"] == pytest.approx(0.3) and cpgd["gain_ci"] == pytest.approx([0.3, 0.3])
    assert cpgd["win_rate"] == 1 and cpgd["w"] == 2.0
    assert report["methods"]["dpo"]["w"] is None
    assert report["comparisons"]["cpgd vs pgd"]["held_out"]["gain"] == pytest.approx(0.1)


def test_w_is_the_best_on_validation_prompts(sweep):
    assert (sweep.best("pgd"), sweep.best("cpgd")) == (1.5, 2.0)


def test_the_tables_print_every_method(results):
    report = build_report(results, 1.0)
    printed = text_table(table(report))
    assert re.search(r"^cPGD +2 +0\.\d{3} +0\.\d{3} +100\.0% +\[100\.0%, 100\.0%\] +\+0\.300", printed, re.MULTILINE)
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
