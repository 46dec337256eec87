"""`python -m sample.report`, from runs as `sample.images` and `sample.score` leave them."""

import csv
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flax_pref.config import UserError
from flax_pref.data.prompts import Prompt
from flax_pref.evaluation import run_report
from flax_pref.images.image_set import ImageSet, Item
from sample import report

PAGES = ["report.html", "vote.html"]
FILES = ["categories.csv", "figures", "report.md", "features.csv", "report.json", "table.csv", "table.tex"]
HOSTILE = "</script><script>alert(1)</script>"


def draw_run(folder, scores, settings, layout="flat"):
    """Draws images of 6 prompts under 2 seeds and writes scores of the images."""
    prompts = [Prompt(i, f"{HOSTILE} {i}", "AB"[i % 2], {"Category": "AB"[i % 2]}) for i in range(6)]
    items = [Item(prompt, seed) for prompt in prompts for seed in range(2)]
    images = ImageSet(folder, items, settings, layout=layout)
    images.begin()
    images.write(images.pending, np.random.default_rng(0).integers(256, size=(12, 8, 8, 3), dtype=np.uint8))
    images.finish()
    table = pq.read_table(folder / "manifest.parquet")
    if "record" not in table.column_names:
        table = table.append_column("record", pa.array([json.dumps(item.prompt.record) for item in items]))
    for name, values in scores.items():
        table = table.append_column(f"score:{name}", pa.array(values, pa.float32()))
    table = table.append_column("problem", pa.array([""] * 12))
    rewards = {name: {"path": None, "sha256": None} for name in scores}
    described = json.dumps({"rewards": rewards, "features": {}, "distances": {}})
    pq.write_table(table.replace_schema_metadata({"flax_pref": described}), folder / "scores.parquet")
    return str(folder)


def draw_scores(gain):
    return np.random.default_rng(0).random(12) + gain


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    broken = draw_scores(2)
    broken[:2] = np.nan
    return [
        draw_run(folder / "base", {"judge": draw_scores(0), "size": draw_scores(0)}, {"rule": "cfg"}),
        draw_run(folder / "w2", {"judge": draw_scores(1)}, {"rule": "cpgd", "w": "2"}, "webdataset"),
        draw_run(folder / "w4", {"judge": broken, "size": draw_scores(0)}, {"rule": "cpgd", "w": "4"}, "webdataset"),
    ]


@pytest.mark.parametrize("images", ["link", "embed", "none"])
def test_everything_is_written_and_printed(runs, tmp_path, capsys, images):
    out = tmp_path / "new" / "report"
    report.main([*runs, "--out", str(out), "--images", images])
    written = {path.name for path in out.iterdir()}
    assert {*FILES, "report.html"} <= written <= {*FILES, *PAGES, "images"}
    content = json.loads((out / "report.json").read_text())
    assert (content["baseline"], content["pairs"], content["prompts"]) == ("base", 12, 6)
    assert [point["w"] for point in content["sweeps"][0]["points"]] == [2, 4]
    assert {(row["column"], row["value"]) for row in content["categories"]} == {("Category", "A"), ("Category", "B")}
    with open(out / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["w"], row["win_rate"]) for row in rows] == [
        *(("base", "", ""), ("w2", "2.0", "1.0"), ("w4", "4.0", "1.0"))
    ]
    printed = capsys.readouterr().out
    assert printed.startswith("12 pairs (prompt, seed) of 6 prompts; baseline base;")
    assert "size: left out, w2 not scored by it" in printed
    assert "judge: 2 pairs left out, scores that are not finite: w4 2" in printed
    assert re.search(r"^w2 +\d\.\d+ +\[.*\] +100\.0% +\[100\.0, 100\.0\] +\+1\.000", printed, re.MULTILINE)
    assert f"wrote {out}/report.html" in printed
    assert HOSTILE not in (out / "report.html").read_text()


def test_a_second_report_takes_the_place_of_the_first_and_leaves_other_files(runs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    report.main([*runs, "--out", str(tmp_path)])
    report.main([f"a={runs[0]}", f"b={runs[2]}", "--baseline", runs[2], "--rewards", "size", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "report.json").read_text())
    assert [method["name"] for method in content["methods"]] == ["a", "b"]
    assert content["baseline"] == "b" and content["rewards"] == ["size"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_single_run_has_its_means(runs, tmp_path, capsys):
    report.main([runs[0], "--out", str(tmp_path)])
    (row, _) = json.loads((tmp_path / "report.json").read_text())["overall"]
    assert row["mean"]["low"] < row["mean"]["value"] < row["mean"]["high"]
    assert row["win_rate"] is None
    assert r"\begin{tabular}{lrr}" in (tmp_path / "table.tex").read_text()


def test_what_is_left_out_is_said(runs, tmp_path, capsys):
    table = pq.read_table(f"{runs[0]}/scores.parquet")
    problems = pa.array(["", "missing", *[""] * 9])
    few = table.take([0, 1, *range(3, 12)]).drop_columns("problem").append_column("problem", problems)
    (tmp_path / "few").mkdir()
    pq.write_table(few, tmp_path / "few" / "scores.parquet")
    report.main([runs[2], str(tmp_path / "few"), "--out", str(tmp_path / "out"), "--images", "none"])
    printed = capsys.readouterr().out
    assert "\nw4: 2 of 12 images left out (2 without a counterpart in another run)\n" in printed
    assert "\nfew: 1 of 11 images left out (1 missing)\n" in printed


def test_votes_are_counted(runs, tmp_path, capsys):
    vote = {"prompt_id": 0, "prompt": f"{HOSTILE} 0", "seed": 1, "left": "w2", "right": "base", "vote": "left"}
    file = tmp_path / "votes.json"
    file.write_text(json.dumps({"kind": "flax_pref votes", "methods": ["base", "w2"], "votes": [vote]}))
    report.main([*runs, "--votes", str(file), "--out", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "report.json").read_text())["votes"]
    assert row["win_rate"] == {"value": 1, "low": None, "high": None}
    assert re.search(r"^w2 +1 +1 +100\.0% +1$", capsys.readouterr().out, re.MULTILINE)


def test_methods_are_called_as_they_are_told_or_like_their_folders(tmp_path):
    for name in ("x/base", "y/base", "y/w=4"):
        (tmp_path / name).mkdir(parents=True)
    folders = [str(tmp_path / name) for name in ("x/base", "y/base", "y/w=4")]
    assert list(run_report.methods_of(folders)) == ["x/base", "y/base", "w=4"]
    assert run_report.methods_of([f"my={folders[0]}", f"{folders[1]}/"]) == {"my": folders[0], "base": f"{folders[1]}/"}
    assert run_report.baseline_of(folders[1], {"my": folders[0], "base": f"{folders[1]}/"}) == "base"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no runs; expected scored folders"),
        (["{base}", "{base}/"], r"base/: is the same folder as \S+base; expected each run once"),
        (["a={base}", "a={w2}"], "two runs are called a; expected different names"),
        (["{base}", "{w2}", "--baseline", "cpgd"], "--baseline cpgd: no such method; expected one of base, w2"),
        (["{base}", "--out", "{base}"], r"--out \S+: is the folder of the run"),
        (["{base}", "--out", "{base}/manifest.parquet"], "is a file; expected a folder"),
        (["{base}", "--out", "gs://bucket/report"], "expected a local folder"),
        (["={base}"], "expected NAME=FOLDER"),
        (["{base}", "nowhere"], r"nowhere: no such folder; run python -m sample\.score"),
        (["{base}", "--rewards", "clip"], "--rewards clip: no run is scored by it"),
        (["{base}", "--votes", "none.json"], r"none\.json: no such file; expected votes"),
        (["{base}", "--out", "{base}/manifest.parquet/report"], r"manifest\.parquet is a file; expected a folder"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(runs, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(run_report, "compare", None)  # comes after all of them
    monkeypatch.chdir(tmp_path)
    flags = [flag.format(base=runs[0], w2=runs[1]) for flag in flags]
    with pytest.raises((UserError, ValueError, FileNotFoundError), match=message) as caught:
        report.main(flags)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
