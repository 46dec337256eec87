"""T2I-CompBench++, against what its own programs printed for folders of ours, and a transcription of them."""

import json
import shutil

import pytest

from flax_pref.config import UserError
from flax_pref.data.prompts import T2I_COMPBENCH as CATEGORIES
from flax_pref.data.prompts import read_prompts
from flax_pref.evaluation.benchmarks.benchmark import shown_in
from flax_pref.evaluation.benchmarks.t2i_compbench import T2I_COMPBENCH
from flax_pref.evaluation.runs import open_run
from sample import score
from tests.evaluation.benchmarks.drawn_runs import HERE, draw, told_scores

FILES = HERE / "t2i_compbench"
DATASET = FILES / "dataset"

# Printed by the programs of Karine-Huang/T2I-CompBench at 1b70949 on the folders of a run of ours: BLIP_vqa.py,
# CLIP_similarity.py, 2D_spatial_eval.py, 3D_spatial_eval.py, numeracy_eval.py and 3_in_1.py, with functions for
# their networks, which gave numbers and boxes. They also wrote the files.
PUBLISHED = {
    **{"color": 0.556535, "shape": 0.49890999999999996, "texture": 0.5258449999999999, "spatial": 0.4569570849361722},
    **{"3d_spatial": 0.3322900637056946, "numeracy": 0.5, "non_spatial": 0.756100244820118},
    "complex": 0.5677791449212033,
}


@pytest.fixture
def run(tmp_path):
    draw(tmp_path / "base", DATASET, "t2i_compbench", seeds=10)
    for file in FILES.rglob("vqa_result.json"):
        (tmp_path / "base" / file.relative_to(FILES)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "base" / file.relative_to(FILES))
    return tmp_path / "base"


def numbers(path):
    return [float(row["answer"]) for row in json.loads((FILES / path).read_text())]


def transcribed_3_in_1():
    blip, clip = (numbers(f"complex/annotation_{name}/vqa_result.json") for name in ("blip", "clip"))
    spatial = numbers("complex/labels/annotation_obj_detection_2d/vqa_result.json")
    texts = {
        name: [line.split(".")[0].lower() for line in (DATASET / f"complex_val{name}.txt").read_text().splitlines()]
        for name in ("", "_spatial", "_action")
    }
    values = []
    for i, (a, c, s) in enumerate(zip(blip, clip, spatial, strict=True)):
        text = texts[""][i // 10]
        if text in texts["_spatial"]:
            values.append((s + a) * 0.5)
        elif text in texts["_action"]:
            values.append((c + a) * 0.5)
        else:
            values.append((a + s + c) / 3)
    return values


def test_the_scores_are_those_of_the_authors_programs(run, capsys):
    (run / "complex/annotation_3_in_1/vqa_result.json").unlink()  # it is computed here
    score.main([str(run), "--benchmarks", "t2i_compbench"])
    printed = told_scores(capsys.readouterr().out, "t2i_compbench")
    assert printed == pytest.approx(PUBLISHED, abs=5.1e-5)
    shown = shown_in(open_run(run).rows)
    answers = T2I_COMPBENCH.read(run, shown)
    measures = {one.name: one.value for one in T2I_COMPBENCH.measures(shown, answers)}
    assert measures == pytest.approx(PUBLISHED, rel=1e-12)
    whole = [value for image, (value,) in zip(shown, answers, strict=True) if image.record["category"] == "complex"]
    assert whole == pytest.approx(transcribed_3_in_1(), rel=1e-12)
    assert whole == pytest.approx(numbers("complex/annotation_3_in_1/vqa_result.json"), rel=1e-12)


def test_3_in_1_is_read_where_its_parts_are_missing(run, capsys):
    shutil.rmtree(run / "complex/annotation_clip")
    score.main([str(run), "--benchmarks", "t2i_compbench"])
    assert told_scores(capsys.readouterr().out, "t2i_compbench")["complex"] == pytest.approx(
        PUBLISHED["complex"], abs=5e-5
    )
    (run / "complex/annotation_3_in_1/vqa_result.json").unlink()
    with pytest.raises(UserError, match=r"complex: no annotation_clip/vqa_result\.json, and no annotation_3_in_1"):
        score.main([str(run), "--benchmarks", "t2i_compbench"])


def test_a_run_of_one_category_takes_a_file(tmp_path, capsys):
    draw(tmp_path / "color", DATASET / "color_val.txt", "t2i_compbench", seeds=10)
    assert (tmp_path / "color/color/samples/a red cup and a brown dog_000019.png").exists()
    score.main(
        [str(tmp_path / "color"), "--benchmarks", f"t2i_compbench={FILES}/color/annotation_blip/vqa_result.json"]
    )
    assert told_scores(capsys.readouterr().out, "t2i_compbench") == pytest.approx({"color": 0.5565}, abs=5e-5)


def test_prompts_have_their_category_and_complex_ones_their_relations():
    prompts = read_prompts(DATASET)
    assert list(dict.fromkeys(prompt.group for prompt in prompts)) == list(CATEGORIES)
    assert [prompt.text for prompt in prompts][:2] == ["a green bench and a blue bowl", "a red cup and a brown dog"]
    assert [prompt.record.get("relations") for prompt in prompts][-4:] == [
        *("spatial", "action", "spatial and action", "spatial"),
    ]


def test_the_names_are_prompt_and_number_within_the_category(run):
    prompts = read_prompts(DATASET)
    for category in CATEGORIES:
        texts = [prompt.text for prompt in prompts if prompt.group == category]
        wanted = {f"{text}_{10 * i + seed:06d}.png" for i, text in enumerate(texts) for seed in range(10)}
        assert {path.name for path in (run / category / "samples").iterdir()} == wanted


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda rows: rows[:-1], "no answer about 1 of 20 images, e.g. image 19"),
        (
            lambda rows: [*rows, {"question_id": 20, "answer": 1}],
            "1 answers are about images that this run does not have",
        ),
        (lambda rows: [*rows, rows[0]], "row 20: a second answer about image 0"),
        (lambda rows: [{"question_id": 0}, *rows[1:]], "row 0: {'question_id': 0} is not question_id and answer"),
        (lambda rows: [{"question_id": 0, "answer": "nan"}, *rows[1:]], "row 0: answer 'nan'; expected a score"),
        (lambda rows: [{"question_id": 0, "answer": 31.4}, *rows[1:]], "row 0: answer 31.4; expected a score"),
        (lambda rows: [5], "row 0: 5 is not question_id and answer"),
        (lambda rows: {}, "holds no list"),
    ],
)
def test_a_file_of_other_images_or_a_damaged_one_costs_a_line(run, damage, told):
    file = run / "shape/annotation_blip/vqa_result.json"
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(UserError, match=told):
        score.main([str(run), "--benchmarks", "t2i_compbench"])
    assert not (run / "scores.parquet").exists()


def test_a_missing_file_and_a_file_for_several_categories_cost_a_line(run):
    (run / "numeracy/annotation_num/vqa_result.json").unlink()
    with pytest.raises(UserError, match=r"numeracy/annotation_num/vqa_result\.json: no such file"):
        score.main([str(run), "--benchmarks", "t2i_compbench"])
    with pytest.raises(UserError, match="is a file, and this run shows 8 categories"):
        score.main([str(run), "--benchmarks", f"t2i_compbench={FILES}/color/annotation_blip/vqa_result.json"])


def test_images_of_another_program_in_this_layout_are_scored_too(run, capsys):
    for file in ("manifest.parquet", "settings.json", "contact_sheet.png"):
        (run / file).unlink()
    score.main([str(run), "--prompts", str(DATASET), "--benchmarks", "t2i_compbench"])
    out = capsys.readouterr().out
    assert "no manifest; 180 images, prompts by T2I-CompBench's layout" in out
    assert told_scores(out, "t2i_compbench") == pytest.approx(PUBLISHED, abs=5.1e-5)
