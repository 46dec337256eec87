"""Methods beside controls, reward hacking, and reports that travel: Markdown, LaTeX, SVG and leaderboards."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from test_comparison import KEYS, draw, loop_summary, write_run

from flax_pref.config import UserError
from flax_pref.evaluation.leaderboard import leaderboard_of, merge_reports
from flax_pref.evaluation.leaderboard_flags import LeaderboardFlags
from flax_pref.evaluation.report_flags import ReportFlags
from flax_pref.evaluation.run_report import report_runs
from flax_pref.evaluation.statistics import holm, near_duplicates
from flax_pref.evaluation.tables import latex_table
from flax_pref.images.cost import ImageCost, read_cost, write_cost

NAMES = ("base", "dpo_1", "more & steps", "best-of-3")


def scores_of(i):
    """A method that gains 0.5, and controls that gain 0.25 and more than the method."""
    gain = (0, 0.5, 0.25, 0.75)[i]
    return {"judge": draw(0) + gain + draw(i) / 8, "other": draw(4) + draw(i) / 8, "saturation": draw(i)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for i, name in enumerate(NAMES):
        settings = {"rule": "cfg" if i != 1 else "cpgd", "w": str(i)}
        write_run(folder / name, scores_of(i), settings=settings)
        write_cost(folder / name, ImageCost((100, 300, 300, 300)[i], 0.5 * (i + 1), "2 x cpu"))
    return [str(folder / name) for name in NAMES]


@pytest.fixture(scope="module")
def out(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "report"
    report_runs(ReportFlags(runs=tuple(folders), controls=NAMES[2:], trained_on="judge", out=str(out), images="none"))
    return out


@pytest.fixture(scope="module")
def report(out):
    return json.loads((out / "report.json").read_text())


def test_gains_over_controls_are_those_of_a_loop_over_prompts(report):
    rows = report["controls"]
    assert {(row["control"], row["method"]) for row in rows} == {("more & steps", "dpo_1"), ("best-of-3", "dpo_1")}
    assert {row["reward"] for row in rows} == {"judge", "other"}  # looks are no rewards
    ps = []
    for row in rows:
        own, control = (np.float32(scores_of(NAMES.index(name))[row["reward"]]) for name in ("dpo_1", row["control"]))
        (_, win_rate, gain), low, high, (_, _, p) = loop_summary(own, control, KEYS)
        np.testing.assert_allclose([row["gain"]["low"], row["gain"]["high"]], [low[2], high[2]], rtol=1e-6)
        assert abs(row["sign_test"]["p"] - p) < 1e-12
        np.testing.assert_allclose([row["win_rate"]["value"], row["gain"]["value"]], [win_rate, gain], rtol=1e-6)
        ps.append(row["sign_test"]["p"])
    assert [row["sign_test"]["p_corrected"] for row in rows] == holm(ps)


def test_a_verdict_says_above_below_and_neither_by_the_intervals(report):
    judge, other = report["verdicts"]
    assert re.fullmatch(r"judge: dpo_1 is above more & steps \(\+0\.2.*\); below best-of-3 \(-0\.2.*\)", judge)
    assert other.startswith("other: dpo_1 is ") and "judge" not in other


def test_the_cost_stands_beside_the_gains(report, out):
    assert report["methods"][1]["cost"] == {"predictions": 300, "seconds": 1.0, "devices": "2 x cpu"}
    fair = next(line for line in (out / "report.md").read_text().splitlines() if line.startswith("| judge, fair"))
    assert fair.split("|")[2:5] == [" predictions ", " seconds ", " over base "]


def test_standardised_gains_are_in_deviations_of_the_baseline_over_prompts(report):
    prompts = np.array([prompt for prompt, _ in KEYS])
    for row in report["standardised"]:
        own, base = (np.float32(scores_of(NAMES.index(name))[row["reward"]]) for name in (row["method"], "base"))
        by = [(own[prompts == p].mean(), base[prompts == p].mean()) for p in range(9)]
        expected = np.mean([a - b for a, b in by]) / np.std([b for _, b in by], ddof=1)
        assert abs(row["gain"]["value"] - expected) < 1e-6
    assert {row["reward"] for row in report["standardised"]} == {"judge", "other"}


def test_figures_are_svg_and_the_same_again(out, report, folders, tmp_path):
    files = sorted((out / "figures").iterdir())
    assert [file.name for file in files] == ["curves.svg", "gains.svg", "hacking.svg"]
    again = ReportFlags(
        runs=tuple(folders), controls=NAMES[2:], trained_on="judge", out=str(tmp_path / "x"), images="none"
    )
    report_runs(again)
    for file in files:
        root = ElementTree.parse(file).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert file.read_bytes() == (tmp_path / "x" / "figures" / file.name).read_bytes()
    texts = (out / "figures" / "gains.svg").read_text()
    assert "dpo_1" in texts and "judge" in texts


ENGINE = next(filter(None, map(shutil.which, ("tectonic", "pdflatex", "lualatex", "xelatex"))), None)
DOCUMENT = r"\documentclass{article}\usepackage{booktabs}\begin{document}%s\end{document}"


@pytest.mark.skipif(ENGINE is None, reason="no TeX engine is installed")
def test_the_table_for_papers_compiles(out, report, tmp_path):
    for name in ("a_b", "50 %", "x^2 & #1", "~\\ {}<|>$"):
        report = {**report, "methods": [*report["methods"], {**report["methods"][1], "name": name}]}
        own = [{**row, "method": name} for row in report["overall"] if row["method"] == "dpo_1"]
        report["overall"] = [*report["overall"], *own]
    for i, table in enumerate(((out / "table.tex").read_text(), latex_table(report))):
        (tmp_path / f"{i}.tex").write_text(DOCUMENT % table)
        command = [ENGINE, f"{i}.tex"] if "tectonic" in ENGINE else [ENGINE, "-halt-on-error", f"{i}.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and (tmp_path / f"{i}.pdf").exists(), done.stdout[-2000:]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"controls": ("nowhere",)}, "--controls nowhere: no such run; expected names of base"),
        ({"controls": ("base",)}, "--controls base: is the baseline"),
        ({"controls": NAMES[1:]}, "--controls: no run is left"),
        ({"trained_on": "pickscore"}, "--trained-on pickscore: is none of the rewards compared; expected one of judge"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(folders, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        report_runs(ReportFlags(runs=tuple(folders), out=str(tmp_path / "x"), **flags))
    assert not (tmp_path / "x").exists()


def test_a_cost_that_is_damaged_or_missing_is_unknown(tmp_path):
    assert read_cost(tmp_path) is None
    for content in ("", "[]", "{}", json.dumps({"predictions": 0, "seconds": None, "devices": ""})):
        (tmp_path / "cost.json").write_text(content)
        assert read_cost(tmp_path) is None
    write_cost(tmp_path, ImageCost(100, 2.0, "cpu"))
    write_cost(tmp_path, ImageCost(100))  # nothing was drawn: the time stays
    assert read_cost(tmp_path) == ImageCost(100, 2.0, "cpu")


def test_near_duplicates_are_those_of_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    clusters = np.repeat([0, 1, 2], [2, 3, 5])
    vectors = np.repeat(rng.normal(size=(3, 6)), [2, 3, 5], axis=0) + 0.3 * rng.normal(size=(10, 6))
    expected = []
    for c in range(3):
        own = vectors[clusters == c]
        pairs = [(a, b) for i, a in enumerate(own) for b in own[:i]]
        expected.append(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= 0.95 for a, b in pairs]))
    assert 0 < np.mean(expected) < 1
    np.testing.assert_array_equal(near_duplicates(7 * vectors, clusters), expected)


def test_a_leaderboard_has_a_row_for_each_method_and_a_column_for_each_reward(report, out, tmp_path):
    other = {**report, "pairs_sha256": "x", "weights": {**report["weights"], "judge": "b" * 64}}
    board = leaderboard_of({"one": report, "again": report, "else": other})
    assert [s["reports"] for s in board["sets"]] == [["one", "again"], ["else"]]
    assert board["rewards"] == [f"judge ({report['weights']['judge'][:8]})", "other", "judge (bbbbbbbb)"]
    assert [(row["set"], row["method"]) for row in board["rows"]] == [(i, name) for i in (0, 1) for name in NAMES]
    row = board["rows"][1]
    assert (row["predictions"], row["seconds"], row["control"], board["rows"][2]["control"]) == (300, 1.0, False, True)
    gain = next(r for r in report["overall"] if (r["method"], r["reward"]) == ("dpo_1", "judge"))["gain"]
    assert row["cells"][board["rewards"][0]]["gain"] == gain
    page = merge_reports(LeaderboardFlags(reports=(str(out),), out=str(tmp_path / "board"))) / "leaderboard.html"
    assert "dpo_1" in page.read_text() and (tmp_path / "board" / "leaderboard.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("{}", "not a report"), ('{"overall": 1, "methods": 3, "rewards": []}', "not a report")],
)
def test_what_is_no_report_is_refused_in_one_line(content, message, tmp_path):
    (tmp_path / "r").mkdir()
    if content is not None:
        (tmp_path / "r" / "report.json").write_text(content)
    with pytest.raises((UserError, OSError, ValueError), match=message) as error:
        merge_reports(LeaderboardFlags(reports=(str(tmp_path / "r"),), out=str(tmp_path / "board")))
    assert "\n" not in str(error.value) and not (tmp_path / "board").exists()
