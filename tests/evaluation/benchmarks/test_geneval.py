"""GenEval's scores, against what its own `summary_scores.py` printed for the same file, and a transcription of it."""

import collections
import csv
import json
import statistics

import numpy as np
import pyarrow.parquet as pq
import pytest

from flax_pref.config import UserError
from flax_pref.evaluation.benchmarks.benchmark import intervals, shown_in
from flax_pref.evaluation.benchmarks.geneval import GENEVAL, Detection, judge
from flax_pref.evaluation.run_scoring import score_runs
from flax_pref.evaluation.runs import open_run
from flax_pref.evaluation.score_flags import ScoreFlags
from flax_pref.evaluation.statistics import bootstrap_interval
from flax_pref.files import read_json
from sample import report, score
from tests.evaluation.benchmarks.drawn_runs import HERE, draw, told_scores

METADATA, RESULTS = HERE / "geneval_metadata.jsonl", HERE / "geneval_results.jsonl"
DETECTIONS = HERE / "geneval_detections.jsonl"
# Of each prompt whether its six images are correct, by the rules in `evaluation/evaluate_images.py` of the same commit,
# whose detector and classifier of colours were functions that gave what is in the file.
JUDGED = [
    *("111011", "111000", "001111", "110011", "001000", "000000", "100011", "111100", "010100", "000000", "110101"),
]

# Printed by djghosh13/geneval at af4902f, `python evaluation/summary_scores.py geneval_results.jsonl`.
PUBLISHED = {
    **{"single_object": 1.0, "two_object": 0.3333, "counting": 0.3333, "colors": 0.8333, "position": 0.3333},
    **{"color_attr": 0.3333, "correct images": 0.5455, "correct prompts": 0.8182, "overall": 0.52778},
}


@pytest.fixture
def run(tmp_path):
    draw(tmp_path / "base", METADATA, "geneval", seeds=3)
    return tmp_path / "base"


def rows():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def write(file, some):
    file.write_text("".join(json.dumps(row) + "\n" for row in some))
    return file


def transcribed(some):
    """Means in float64 of Python's own, in the order of the authors' summary."""
    tasks, prompts = collections.defaultdict(list), collections.defaultdict(list)
    for row in some:
        tasks[row["tag"]].append(float(row["correct"]))
        prompts[row["metadata"]].append(row["correct"])
    scores = {tag: statistics.fmean(values) for tag, values in tasks.items()}
    overall = statistics.fmean(scores.values())
    return scores | {
        "correct images": statistics.fmean(float(row["correct"]) for row in some),
        "correct prompts": statistics.fmean(float(any(values)) for values in prompts.values()),
        "overall": overall,
    }


def test_the_summary_is_the_one_of_the_authors_program(run, capsys):
    score.main([str(run), "--benchmarks", f"geneval={RESULTS}"])
    printed = told_scores(capsys.readouterr().out, "geneval")
    assert printed == pytest.approx(PUBLISHED, abs=5.1e-5)
    shown = shown_in(open_run(run).rows)
    measures = GENEVAL.measures(shown, GENEVAL.read(RESULTS, shown))
    assert {one.name: one.value for one in measures} == pytest.approx(transcribed(rows()), rel=1e-12)
    assert printed.keys() == PUBLISHED.keys()


def test_every_image_has_its_own_answer_in_the_table(run):
    score.main([str(run), "--benchmarks", f"geneval={RESULTS}"])
    table = pq.read_table(run / "scores.parquet").to_pylist()
    correct = {row["filename"].removeprefix("images/"): row["correct"] for row in rows()}
    assert {row["file"]: row["score:geneval"] for row in table} == correct
    assert [row["answers:geneval"] for row in table] == [[row["score:geneval"]] for row in table]
    before = (run / "scores.parquet").read_bytes()
    score.main([str(run), "--benchmarks", "geneval"])  # from what is stored
    assert (run / "scores.parquet").read_bytes() == before
    found = score_runs(ScoreFlags(runs=(str(run),), benchmarks=("geneval",)))
    assert found[str(run)]["geneval"].sum() == sum(correct.values())


def test_the_file_is_found_in_the_folder_and_other_scores_stay(run, capsys):
    score.main([str(run), "--rewards", "compressibility"])
    write(run / "results.jsonl", rows()[::-1])
    score.main([str(run), "--benchmarks", "geneval"])
    write(run / "results.jsonl", [row | {"correct": True} for row in rows()])
    capsys.readouterr()
    score.main([str(run), "--benchmarks", "geneval"])
    out = capsys.readouterr().out
    assert "geneval is computed again: was answers_sha256=" in out
    assert set(told_scores(out, "geneval").values()) == {1.0}
    assert {"score:compressibility", "score:geneval"} <= set(pq.read_table(run / "scores.parquet").column_names)


def test_intervals_are_of_prompts_and_each_task_is_resampled_by_itself(run):
    shown = shown_in(open_run(run).rows)
    measures = {one.name: one for one in GENEVAL.measures(shown, GENEVAL.read(RESULTS, shown))}
    correct = collections.defaultdict(list)
    for row in rows():
        correct[row["metadata"]].append(row["correct"])
    # As many images of each prompt: the interval is that of the prompts' means, in any order.
    means = np.array([np.mean(correct[json.dumps(dict(image.record))]) for image in shown[::3]])
    (found,) = intervals([measures["correct images"]])
    assert (found["low"], found["high"]) == pytest.approx(bootstrap_interval(means))
    # Tasks with a single prompt are constant: six tasks, of which the three others move the mean.
    rng, tags = np.random.default_rng(1), np.array([image.record["tag"] for image in shown[::3]])
    tasks = [means[tags == tag] for tag in dict.fromkeys(tags)]
    drawn = [np.mean([rng.choice(task, len(task)).mean() for task in tasks]) for _ in range(10_000)]
    (overall,) = intervals([measures["overall"]])
    np.testing.assert_allclose([overall["low"], overall["high"]], np.quantile(drawn, [0.025, 0.975]), atol=0.02)
    (alone,) = intervals([measures["two_object"]])
    assert alone == {"value": pytest.approx(1 / 3), "low": None, "high": None}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda some: some[:-2], r"no answer about 2 of 33 images, e\.g\. prompt \d+, image \d"),
        (lambda some: [*some, some[0] | {"filename": "x/00099/samples/0000.png"}], "1 answers are about images that"),
        (lambda some: [*some, some[0]], "line 34: a second line about images/0000"),
        (
            lambda some: [some[0] | {"prompt": "a photo of a zebra"}, *some[1:]],
            "line 1: prompt .* 'a photo of a zebra'",
        ),
        (lambda some: [some[0] | {"filename": "a.png"}, *some[1:]], "line 1: is about 'a.png'; expected .*0000.png"),
        (lambda some: [some[0] | {"correct": float("nan")}, *some[1:]], r"line 1: not JSON \(NaN is no score\)"),
        (lambda some: [some[0] | {"correct": 0.5}, *some[1:]], "line 1: lacks one of filename, prompt, tag, correct"),
        (lambda some: [[1]], "line 1: lacks one of"),
    ],
)
def test_a_file_of_other_images_or_a_damaged_one_costs_a_line(run, tmp_path, damage, told):
    file = write(tmp_path / "wrong.jsonl", damage(rows()))
    with pytest.raises(UserError, match=told):
        score.main([str(run), "--benchmarks", f"geneval={file}"])
    assert not (run / "scores.parquet").exists()


def test_wrong_flags_and_other_prompts_cost_a_line(run, tmp_path):
    file = tmp_path / "cut.jsonl"
    file.write_text(RESULTS.read_text()[:-40])
    prompts = tmp_path / "other.txt"
    prompts.write_text("a cat\n")
    draw(tmp_path / "other", prompts)
    for flags, told in {
        (str(run), f"geneval={file}"): "line 33: not JSON",
        (str(run), "geneval"): "no results.jsonl in it; name the file of geneval's program",
        (str(run), "genevil=x"): "expected NAME, NAME=FILE or NAME=http://..., with one of geneval",
        (str(run), f"geneval={tmp_path}/none.jsonl"): "no file or folder",
        (str(tmp_path / "other"), f"geneval={RESULTS}"): "prompt 0 'a cat' has no 'tag' and 'include'; expected images",
    }.items():
        with pytest.raises(UserError, match=told):
            score.main([flags[0], "--benchmarks", flags[1]])
    with pytest.raises(UserError, match="is about one folder, and there are 2"):
        score.main([str(run), str(tmp_path / "other"), "--benchmarks", f"geneval={RESULTS}"])
    with pytest.raises(UserError, match="geneval is there twice"):
        score.main([str(run), "--benchmarks", f"geneval={RESULTS}", "geneval"])


def test_methods_are_compared_by_correct_images(run, tmp_path, capsys):
    other = tmp_path / "other"
    draw(other, METADATA, "geneval", seeds=3)
    better = [row | {"correct": row["correct"] or row["tag"] == "counting"} for row in rows()]
    write(other / "results.jsonl", better)
    write(run / "results.jsonl", rows())
    score.main([str(run), str(other), "--benchmarks", "geneval"])
    report.main([str(run), str(other), "--out", str(tmp_path / "report")])
    found = read_json(tmp_path / "report/report.json", expected="a report")
    cells = {row["method"]: row for row in found["overall"]}
    assert cells["base"]["mean"]["value"] == pytest.approx(transcribed(rows())["correct images"])
    assert cells["other"]["sign_test"]["wins"] == 3 and cells["other"]["sign_test"]["ties"] == 8


def test_the_report_has_the_published_scores_and_their_differences(run, tmp_path, capsys):
    draw(tmp_path / "other", METADATA, "geneval", seeds=3)
    better = [row | {"correct": row["correct"] or row["tag"] == "counting"} for row in rows()]
    write(tmp_path / "other/results.jsonl", better)
    write(run / "results.jsonl", rows())
    score.main([str(run), str(tmp_path / "other"), "--benchmarks", "geneval"])
    report.main([str(tmp_path / "other"), str(run), "--baseline", "base", "--out", str(tmp_path / "report")])
    found = read_json(tmp_path / "report/report.json", expected="a report")["benchmarks"]
    cells = {(row["method"], row["measure"]): row for row in found}
    for method, some in {"base": rows(), "other": better}.items():
        scores = {name: cells[method, name]["score"]["value"] for name in PUBLISHED}
        assert scores == pytest.approx(transcribed(some), rel=1e-12)
    gain = cells["other", "overall"]["difference"]
    assert gain["value"] == pytest.approx((1 - 1 / 3) / 6) and cells["base", "overall"]["difference"] is None
    correct = {row["metadata"]: [] for row in rows() if row["tag"] == "counting"}
    for row in rows():
        if row["tag"] == "counting":
            correct[row["metadata"]].append(1 - row["correct"])
    gains = [np.mean(correct[json.dumps(image)]) for image in map(json.loads, METADATA.read_text().splitlines()[3:6])]
    low, high = bootstrap_interval(np.array(gains))
    one = cells["other", "counting"]["difference"]
    assert (one["low"], one["high"]) == pytest.approx((low, high))
    with (tmp_path / "report/benchmarks.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * len(PUBLISHED)
    assert 'id="benchmarks-table"' in (tmp_path / "report/report.html").read_text()
    assert "overall          other   0.6389" in capsys.readouterr().out


# Boxes of a detector


def boxes():
    return [json.loads(line) for line in DETECTIONS.read_text().splitlines()]


def test_boxes_of_a_detector_are_judged_as_by_the_authors_program(tmp_path, capsys):
    draw(tmp_path / "run", METADATA, "geneval", seeds=6)
    score.main([str(tmp_path / "run"), "--benchmarks", f"geneval={DETECTIONS}"])
    table = pq.read_table(tmp_path / "run/scores.parquet").to_pylist()
    found = [f"{row['score:geneval']:.0f}" for row in table]
    assert ["".join(found[i : i + 6]) for i in range(0, len(found), 6)] == JUDGED
    assert told_scores(capsys.readouterr().out, "geneval")["overall"] == pytest.approx(0.50463, abs=5e-5)


def test_rules_at_their_borders():
    cup, one = {"class": "cup", "count": 1}, Detection("cup", (0, 0, 10, 10), 0.9)
    record = {"tag": "two_object", "include": [cup, cup | {"class": "bowl", "position": ["left of", 0]}]}
    # The centres are 10 apart, of which 0.1 of both widths (2) are left away: 8 / 10 is more than half.
    assert judge(record, [one, Detection("bowl", (-10, 0, 0, 10), 0.4)])
    assert not judge(record, [one, Detection("bowl", (10, 0, 20, 10), 0.4)])
    assert not judge(record, [one, Detection("bowl", (-2, 0, 8, 10), 0.4)])  # too near: no relation at all
    assert not judge(record, [one, Detection("bowl", (-10, -20, 0, -10), 0.4)])  # more above than left
    assert not judge(record, [one, Detection("bowl", (-10, 0, 0, 10), 0.3)])  # must be above 0.3
    two = {"tag": "counting", "include": [cup | {"count": 2}], "exclude": [cup | {"count": 3}]}
    assert judge(two, [one._replace(score=0.91)] * 2)
    assert not judge(two, [one] * 2)  # 0.9 is not above 0.9
    assert not judge(two, [one._replace(score=0.91)] * 3)
    assert judge(two | {"tag": "two_object"}, [one] * 2 + [one._replace(score=0.2)])
    red = {"tag": "colors", "include": [cup | {"color": "red"}]}
    assert judge(red, [one._replace(color="red"), one._replace(color="blue", score=0.8)])
    assert not judge(red, [one._replace(color="red", score=0.8), one._replace(color="blue")])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"detections": 5}, "line 1: lacks one of filename, detections"),
        ({"detections": [{"class": "bench"}]}, "line 1, detection 0: .*expected {.class.: .cup."),
        ({"detections": [{"class": "bench", "box": [0, 1, 2], "score": 1}]}, "line 1, detection 0"),
        ({"detections": [{"class": "bench", "box": [0, 1, 2, "x"], "score": 1}]}, "line 1, detection 0"),
        ({"detections": [7]}, "line 1, detection 0: 7; expected"),
    ],
)
def test_damaged_boxes_cost_a_line(tmp_path, change, told):
    draw(tmp_path / "run", METADATA, "geneval", seeds=6)
    file = write(tmp_path / "boxes.jsonl", [boxes()[0] | change, *boxes()[1:]])
    with pytest.raises(UserError, match=told):
        score.main([str(tmp_path / "run"), "--benchmarks", f"geneval={file}"])


def test_boxes_without_the_colours_that_a_prompt_asks_for_cost_a_line(tmp_path):
    draw(tmp_path / "run", METADATA, "geneval", seeds=6)
    pale = [
        row | {"detections": [{name: one[name] for name in ("class", "box", "score")} for one in row["detections"]]}
        for row in boxes()
    ]
    file = write(tmp_path / "boxes.jsonl", pale)
    with pytest.raises(UserError, match=r"line 37, detection \d: car has no color, and the prompt asks for one"):
        score.main([str(tmp_path / "run"), "--benchmarks", f"geneval={file}"])
