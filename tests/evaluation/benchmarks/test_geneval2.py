"""GenEval 2's Soft-TIFA, against what its own programs printed for the same file, and a transcription of them."""

import collections
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import gmean

from flax_pref.config import UserError
from flax_pref.evaluation.benchmarks.benchmark import shown_in
from flax_pref.evaluation.benchmarks.geneval2 import GENEVAL2
from flax_pref.evaluation.runs import open_run
from sample import score
from tests.evaluation.benchmarks.drawn_runs import HERE, draw, told_scores

DATA, LISTS = HERE / "geneval2_data.jsonl", HERE / "geneval2_score_lists.json"

# Printed by facebookresearch/GenEval2 at a6e82d2: `soft_tifa_analysis.py`, rounded to 2 digits of 100, and the end of
# `evaluation.py` with --method soft_tifa_am and soft_tifa_gm, where soft_tifa returned these lists.
PUBLISHED = {
    **{"object (AM)": 60.82, "attribute (AM)": 60.96, "count (AM)": 71.96, "position (AM)": 75.38, "verb (AM)": 56.79},
    **{"3 atoms (GM)": 59.64, "4 atoms (GM)": 64.6, "5 atoms (GM)": 76.62, "6 atoms (GM)": 61.65},
    **{"7 atoms (GM)": 0.0, "8 atoms (GM)": 65.34, "9 atoms (GM)": 54.82, "10 atoms (GM)": 61.46},
    **{"overall (AM)": 65.88817164351852, "overall (GM)": 57.62262606087958},
}


@pytest.fixture
def run(tmp_path):
    draw(tmp_path / "base", DATA, "geneval2")
    return tmp_path / "base"


def transcribed(data, lists):
    scores, atoms = collections.defaultdict(list), collections.defaultdict(list)
    with np.errstate(divide="ignore"):
        means = [gmean(some) for some in lists]
    for row, some, mean in zip(data, lists, means, strict=True):
        for value, skill in zip(some, row["skills"], strict=True):
            scores[f"{skill} (AM)"].append(value)
        atoms[f"{row['atom_count']} atoms (GM)"].append(mean)
    found = {name: sum(values) / len(values) for name, values in [*scores.items(), *atoms.items()]}
    overall = [sum(some) / len(some) for some in lists]
    return found | {"overall (AM)": sum(overall) / len(overall), "overall (GM)": sum(means) / len(means)}


def test_the_scores_are_those_of_the_authors_programs(run, capsys):
    score.main([str(run), "--benchmarks", f"geneval2={LISTS}"])
    printed = told_scores(capsys.readouterr().out, "geneval2")
    assert {name: 100 * value for name, value in printed.items()} == pytest.approx(PUBLISHED, abs=0.0101)
    shown = shown_in(open_run(run).rows)
    measures = {one.name: one.value for one in GENEVAL2.measures(shown, GENEVAL2.read(LISTS, shown))}
    data = [json.loads(line) for line in DATA.read_text().splitlines()]
    assert measures == pytest.approx(transcribed(data, json.loads(LISTS.read_text())), rel=1e-12)
    for name in ("overall (AM)", "overall (GM)"):
        assert 100 * measures[name] == pytest.approx(PUBLISHED[name], rel=1e-12)
    assert printed.keys() == PUBLISHED.keys()


def test_the_score_of_an_image_is_the_geometric_mean_and_the_answers_are_kept_whole(run):
    (run / "score_lists.json").write_text(LISTS.read_text())
    score.main([str(run), "--benchmarks", "geneval2"])
    rows = pq.read_table(run / "scores.parquet").to_pylist()
    lists = json.loads(LISTS.read_text())
    assert [row["answers:geneval2"] for row in rows] == lists
    wanted = [math.prod(some) ** (1 / len(some)) for some in lists]
    np.testing.assert_allclose([row["score:geneval2"] for row in rows], wanted, rtol=1e-6)


def test_the_layout_gives_the_file_of_each_prompt(run):
    paths = json.loads((run / "image_paths.json").read_text())
    data = [json.loads(line) for line in DATA.read_text().splitlines()]
    assert list(paths) == [row["prompt"] for row in data]
    assert list(paths.values()) == [f"images/{i:05d}.png" for i in range(len(data))]
    assert all((run / path).exists() for path in paths.values())


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda lists: lists[:-1], "holds 11 lists for 12 prompts"),
        (lambda lists: [lists[0][:2], *lists[1:]], "list 0: 2 scores for the 3 questions about 'three green cows'"),
        (lambda lists: [*lists[1:], lists[0]], "list 0: 4 scores for the 3 questions"),
        (lambda lists: [[1.5, *lists[0][1:]], *lists[1:]], "list 0: 1.5 is no probability; expected 0 to 1"),
        (lambda lists: [[None, *lists[0][1:]], *lists[1:]], "list 0: None is no probability"),
        (lambda lists: [[True, *lists[0][1:]], *lists[1:]], "list 0: True is no probability"),
        (lambda lists: [[float("nan")] * 3, *lists[1:]], r"not JSON \(NaN is no score\)"),
        (lambda lists: {"a": 1}, "holds no list for 12 prompts"),
        (lambda lists: [7, *lists[1:]], "list 0: no scores for the 3 questions"),
    ],
)
def test_a_file_of_other_prompts_or_a_damaged_one_costs_a_line(run, tmp_path, damage, told):
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(damage(json.loads(LISTS.read_text()))))
    with pytest.raises(UserError, match=told):
        score.main([str(run), "--benchmarks", f"geneval2={file}"])
    assert not (run / "scores.parquet").exists()


def test_several_seeds_and_prompts_of_others_cost_a_line(tmp_path):
    draw(tmp_path / "two", DATA, seeds=2)
    with pytest.raises(UserError, match="is about one image per prompt, and this run has several"):
        score.main([str(tmp_path / "two"), "--benchmarks", f"geneval2={LISTS}"])
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    for change, told in [
        (
            {"skills": []},
            "has 3 questions and 0 skills; expected images of geneval2, drawn with --prompts geneval2_data",
        ),
        ({"skills": ["object", "count", "colour"]}, "has the skill 'colour', not one of object"),
        ({"vqa_list": [["a?"]] * 3}, "has a question without an answer"),
        ({"atom_count": "3"}, "has no 'vqa_list', 'skills' and 'atom_count'"),
    ]:
        prompts = tmp_path / "other.jsonl"
        prompts.write_text(json.dumps(rows[0] | change))
        draw(tmp_path / told[:12], prompts)
        with pytest.raises(UserError, match=told):
            score.main([str(tmp_path / told[:12]), "--benchmarks", f"geneval2={LISTS}"])
