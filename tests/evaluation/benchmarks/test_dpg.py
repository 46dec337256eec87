"""DPG-Bench, against what its own `compute_dpg_bench.py` printed for grids of ours, and a transcription of it."""

import collections
import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flax_pref.config import UserError
from flax_pref.data.prompts import read_prompts
from flax_pref.evaluation.benchmarks.benchmark import complete, shown_in
from flax_pref.evaluation.benchmarks.dpg import DPG
from flax_pref.evaluation.runs import open_run
from sample import score
from tests.evaluation.benchmarks.drawn_runs import HERE, draw, told_scores

TABLE, DETAIL = HERE / "dpg_bench.csv", HERE / "dpg_results_detail.txt"

# TencentQQGYLab/ELLA at 3c228f1, `compute_dpg_bench.py --resolution 4 --pic-num 4` on the grids of a run of ours, whose
# answers were a function of the pixels of a square and the question: what it printed, in per cent. It failed on p97,
# whose first question it does not read.
PUBLISHED = {
    **{"attribute": 40.0, "entity": 77.77777777777779, "global": 50.0, "other": 50.0, "relation": 33.33333333333333},
    **{"attribute - color": 50.0, "attribute - size": 50.0, "attribute - texture": 0.0, "entity - state": 100.0},
    **{"entity - whole": 75.0, "global -": 0.0, "global - style": 100.0, "other - count": 50.0},
    **{"relation - non-spatial": 100.0, "relation - spatial": 0.0, "overall": 41.14583333333333},
}
# The lines of its other file: the scores of the images of each grid.
OF_IMAGES = {
    "whoops12": [0.75, 0.25, 0.25, 0.5],
    "diffusiondb7": [0.4, 0.4, 0.4, 0.8],
    "stanford3": [0.0, 0.5, 0.3333333333333333, 0.3333333333333333],
    "0": [0.16666666666666666, 0.16666666666666666, 1.0, 0.3333333333333333],
    "p97": [float("nan")] * 4,
}


@pytest.fixture
def run(tmp_path):
    draw(tmp_path / "base", TABLE, "dpg", seeds=4)
    return tmp_path / "base"


def transcribed():
    """In float64 of Python's own, from the files alone: the overall score, and those of the categories."""
    questions = collections.defaultdict(list)
    with TABLE.open(newline="") as file:
        for row in list(csv.DictReader(file))[1:]:
            questions[row["item_id"]].append(row)
    squares = collections.defaultdict(list)
    for line in DETAIL.read_text().splitlines():
        path, rest = line.split(", (")
        square, rest = rest.split("), ")
        squares[path.removeprefix("grids/").removesuffix(".png"), square].append(float(rest.endswith(", yes")))
    prompts, categories = collections.defaultdict(list), {}
    for (item, _), answers in squares.items():
        if item == "p97":
            continue
        yes = {int(row["proposition_id"]): answer for row, answer in zip(questions[item], answers, strict=True)}
        for row in questions[item]:
            if any(yes[int(parent)] == 0 for parent in row["dependency"].split(",") if int(parent)):
                yes[int(row["proposition_id"])] = 0.0
        prompts[item].append(sum(yes.values()) / len(yes))
        names = [row["tuple"].split("(")[0].strip() for row in questions[item]]
        categories[item] = list(zip(names, answers, strict=True))
    means = [sum(scores) / len(scores) for scores in prompts.values()]
    by_name = collections.defaultdict(list)
    for some in categories.values():
        for name, answer in some:
            by_name[name].append(answer)
            by_name[name.split("-")[0].strip()].append(answer)
    found = {name: sum(answers) / len(answers) for name, answers in by_name.items()}
    return found | {"overall": sum(means) / len(means)}


def test_the_scores_are_those_of_the_authors_program(run, capsys):
    score.main([str(run), "--benchmarks", f"dpg={DETAIL}"])
    out = capsys.readouterr().out
    printed = told_scores(out, "dpg")
    assert {name: 100 * value for name, value in printed.items()} == pytest.approx(PUBLISHED, abs=0.0051)
    assert "1 prompt left out, as by the authors' program: e.g. prompt 0, p97: question 4 depends on 1" in out
    shown = shown_in(open_run(run).rows)
    measures = {one.name: one.value for one in DPG.measures(*complete(shown, DPG.read(DETAIL, shown)))}
    assert {name: 100 * value for name, value in measures.items()} == pytest.approx(PUBLISHED, rel=1e-12)
    assert measures == pytest.approx(transcribed(), rel=1e-12)


def test_the_score_of_each_image_is_the_one_the_program_wrote(run):
    (run / "grids/dpg-bench_20260101-000000_results_detail.txt").write_text(DETAIL.read_text())
    score.main([str(run), "--benchmarks", "dpg"])
    rows = pq.read_table(run / "scores.parquet").to_pylist()
    found = collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: row["seed"]):
        found[json.loads(row["record"])["item_id"]].append(row["score:dpg"])
    assert found.keys() == OF_IMAGES.keys()
    for item, scores in OF_IMAGES.items():
        np.testing.assert_allclose(found[item], scores, rtol=1e-6)


def test_a_question_counts_as_no_where_one_that_it_depends_on_does():
    asked = [(1, [0]), (2, [1]), (3, [2]), (4, [5]), (5, [1])]
    record = {"questions": [{"id": i, "dependency": on, "tuple": "", "question": ""} for i, on in asked]}
    assert DPG.score(record, [1.0, 1.0, 1.0, 1.0, 1.0]) == 1.0
    assert DPG.score(record, [1.0, 0.4, 1.0, 1.0, 1.0]) == 3 / 5  # 3 depends on 2
    assert DPG.score(record, [0.4, 1.0, 1.0, 1.0, 1.0]) == 1 / 5  # all fall with 1, 4 not: its parent 5 falls later
    assert DPG.score(record, [0.5, 0.5, 0.5, 0.5, 0.5]) == 1.0


def test_the_grids_have_the_images_in_two_columns(run):
    for item in OF_IMAGES:
        with Image.open(run / f"grids/{item}.png") as grid:
            pixels = np.asarray(grid)
        for place, (y, x) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
            with Image.open(run / f"samples/{item}-{place}.png") as image:
                np.testing.assert_array_equal(pixels[y : y + 4, x : x + 4], np.asarray(image), strict=True)
    assert sorted(path.stem for path in (run / "grids").iterdir()) == sorted(OF_IMAGES)


def test_prompts_are_read_from_the_folder_too_with_the_questions_beside(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "dpg_bench.csv").write_bytes(TABLE.read_bytes())
    for item in OF_IMAGES:
        (tmp_path / f"prompts/{item}.txt").write_text(f"prompt of {item}")
    shown, table = read_prompts(tmp_path / "prompts"), read_prompts(TABLE)
    assert [prompt.record["item_id"] for prompt in shown] == ["0", "diffusiondb7", "p97", "stanford3", "whoops12"]
    assert [prompt.text for prompt in shown] == [f"prompt of {prompt.record['item_id']}" for prompt in shown]
    questions = {prompt.record["item_id"]: prompt.record["questions"] for prompt in table}
    assert {prompt.record["item_id"]: prompt.record["questions"] for prompt in shown} == questions
    assert [prompt.text for prompt in table][1] == "Eight green cabbages in a foggy, quiet field at dawn."
    assert questions["0"][4] == {
        **{"id": 5, "dependency": [1, 2], "tuple": "relation - spatial (cabbages, field, in)"},
        "question": "Are the cabbages in the field, or near it?",
    }
    assert [question["id"] for question in questions["p97"]] == [2, 3, 4]  # the first of the file is not read
    (tmp_path / "prompts/0.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"0\.txt: has 2 lines with text; expected one prompt in each"):
        read_prompts(tmp_path / "prompts")
    (tmp_path / "dpg_bench.csv").unlink()
    (tmp_path / "prompts/0.txt").write_text("one")
    draw(tmp_path / "run", tmp_path / "prompts", "dpg")
    with pytest.raises(UserError, match="prompt 0 'one' has no 'item_id' and 'questions'; expected images of dpg"):
        score.main([str(tmp_path / "run"), "--benchmarks", f"dpg={DETAIL}"])


def test_a_table_with_a_damaged_row_costs_a_line(tmp_path):
    file = tmp_path / "dpg_bench.csv"
    file.write_text(TABLE.read_text().replace(",2,3,other", ",2,three,other"))
    with pytest.raises(ValueError, match="line 19: proposition_id or dependency is no whole number"):
        read_prompts(file)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            lambda lines: lines[:15] + lines[16:],
            r"3 answers to the 4 questions about whoops12, image 3; run compute_dpg",
        ),
        (
            lambda lines: [line for line in lines if "stanford3" not in line],
            "no answer about 4 of 16 images, e.g. stanford3",
        ),
        (lambda lines: [*lines, lines[0]], "line 88: asks 'Is there a cat.' about whoops12, expected no more"),
        (
            lambda lines: [lines[1], lines[0], *lines[2:]],
            "line 1: asks 'Are there three lamps.' .* expected 'Is there a cat",
        ),
        (
            lambda lines: ["grids/x.png, (0, 0, 4, 4), Is it?, yes", *lines],
            "line 1: is about 'x', which this run does not",
        ),
        (lambda lines: ["grids/x.png 1", *lines], "line 1: 'grids/x.png 1' is not path, square, question and answer"),
        (lambda lines: [line for line in lines if "(4, 4," not in line], "no answer about 4 of 16 images"),
    ],
)
def test_a_file_of_other_images_or_a_damaged_one_costs_a_line(run, tmp_path, damage, told):
    file = tmp_path / "wrong_detail.txt"
    file.write_text("".join(f"{line}\n" for line in damage(DETAIL.read_text().splitlines())))
    with pytest.raises(UserError, match=told):
        score.main([str(run), "--benchmarks", f"dpg={file}"])
    assert not (run / "scores.parquet").exists()


def test_images_of_another_program_are_found_by_the_items_in_their_names(run, tmp_path, capsys):
    (run / "samples").rename(tmp_path / "others")
    score.main([str(tmp_path / "others"), "--prompts", str(TABLE), "--benchmarks", f"dpg={DETAIL}"])
    out = capsys.readouterr().out
    assert "no manifest; 20 images, prompts by DPG-Bench's item ids" in out
    assert {name: 100 * value for name, value in told_scores(out, "dpg").items()} == pytest.approx(
        PUBLISHED, abs=0.0051
    )
