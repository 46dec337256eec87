"""Questions of DPG-Bench and GenEval 2 to a service that answers with the probability of yes."""

import base64
import hashlib
import io
import json
import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flax_pref.config import UserError
from flax_pref.data.prompts import read_prompts
from flax_pref.evaluation.benchmarks.dpg import DPG
from flax_pref.evaluation.benchmarks.geneval2 import GENEVAL2
from sample import score
from tests.evaluation.benchmarks.drawn_runs import HERE, draw, told_scores
from tests.evaluation.benchmarks.test_dpg import DETAIL, PUBLISHED, TABLE
from tests.services import LocalService

asked = []


def says_yes(pixels, question):
    """The answer of the model in whose place the authors' program was run: see docs/parity.md."""
    return hashlib.sha256(pixels.tobytes() + question.encode()).digest()[0] < 150


def model(images, questions):
    """A function of a user's; it can be told to end while it works, or to answer badly."""
    asked.extend(questions)
    if len(asked) == model.ends_after:
        os.kill(os.getpid(), signal.SIGTERM)
    pixels = np.round(255 * images).astype(np.uint8)
    found = [0.9 if says_yes(image, text) else 0.3 for image, text in zip(pixels, questions, strict=True)]
    return model.answers(found)


MODEL = f"python:{__name__}:model"


@pytest.fixture(autouse=True)
def usual(monkeypatch):
    asked.clear()
    monkeypatch.setattr(model, "ends_after", None, raising=False)
    monkeypatch.setattr(model, "answers", lambda found: found, raising=False)


def respond(handler, body):
    request = json.loads(body)
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in request["images"]]
    yes = [says_yes(image, text) for image, text in zip(images, request["prompts"], strict=True)]
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(json.dumps({"scores": [float(answer) for answer in yes]}).encode())


@pytest.fixture
def service():
    service = LocalService(respond)
    yield service.url
    service.close()


def column(folder, name):
    return pq.read_table(folder / "scores.parquet")[name].to_pylist()


def test_a_service_and_the_authors_file_of_the_same_answers_give_the_same_scores(service, tmp_path, capsys):
    draw(tmp_path / "asked", TABLE, "dpg", seeds=4)
    draw(tmp_path / "read", TABLE, seeds=4)
    score.main([str(tmp_path / "asked"), "--benchmarks", f"dpg={service}", "--batch-size", "4"])
    printed = told_scores(capsys.readouterr().out, "dpg")
    assert {name: 100 * value for name, value in printed.items()} == pytest.approx(PUBLISHED, abs=0.0051)
    score.main([str(tmp_path / "read"), "--benchmarks", f"dpg={DETAIL}"])
    assert column(tmp_path / "asked", "answers:dpg") == column(tmp_path / "read", "answers:dpg")
    np.testing.assert_array_equal(column(tmp_path / "asked", "score:dpg"), column(tmp_path / "read", "score:dpg"))


def test_told_to_end_it_finishes_the_image_and_the_same_command_resumes(tmp_path, capsys, monkeypatch):
    for name in ("whole", "parts"):
        draw(tmp_path / name, TABLE, "dpg", seeds=2)
    flags = ["--benchmarks", f"dpg={MODEL}", "--batch-size", "2"]
    score.main([str(tmp_path / "whole"), *flags])
    every = len(asked)
    asked.clear()
    monkeypatch.setattr(model, "ends_after", 14)
    score.main([str(tmp_path / "parts"), *flags])
    assert 14 <= len(asked) < every
    assert (
        "dpg: answers about 5 of 10 images, stopped with 5 left; the same command resumes there"
        in capsys.readouterr().out
    )
    score.main([str(tmp_path / "parts"), *flags])
    assert len(asked) == every, "no question is asked twice"
    whole, parts = ((tmp_path / name / "scores.parquet").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    asked.clear()
    score.main([str(tmp_path / "parts"), *flags])
    assert not asked and (tmp_path / "parts/scores.parquet").read_bytes() == whole


def test_questions_about_numbers_become_yes_or_no_questions(tmp_path):
    data = HERE / "geneval2_data.jsonl"
    draw(tmp_path / "run", data, "geneval2")
    score.main([str(tmp_path / "run"), "--benchmarks", f"geneval2={MODEL}"])
    assert asked[:3] == [
        'Is "three" the answer to the question "How many cows are in the image?"?',
        "Are there any cows in the image?",
        "Are the cows green?",
    ]
    records = [prompt.record for prompt in read_prompts(data)]
    assert len(asked) == sum(len(record["vqa_list"]) for record in records)
    answers = column(tmp_path / "run", "answers:geneval2")
    assert {value for some in answers for value in some} == {0.9, 0.3}
    wanted = [GENEVAL2.score(record, some) for record, some in zip(records, answers, strict=True)]
    np.testing.assert_allclose(column(tmp_path / "run", "score:geneval2"), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (lambda found: found[1:], r"dpg: python:.*:model gave \[3\] for 4 questions; expected one number each"),
        (lambda found: [7.5, *found[1:]], "dpg: python:.*:model answered 7.5 to 'Are there cabbages.'"),
        (lambda found: 1 / 0, "dpg: ZeroDivisionError: division by zero"),
    ],
)
def test_wrong_answers_cost_a_line_and_nothing_that_was_answered(tmp_path, monkeypatch, answers, told):
    draw(tmp_path / "run", TABLE, "dpg", seeds=2)
    usual = model.answers
    monkeypatch.setattr(model, "answers", lambda found: answers(found) if len(asked) > 24 else usual(found))
    with pytest.raises(UserError, match=told.replace("Are there cabbages", ".*")):
        score.main([str(tmp_path / "run"), "--benchmarks", f"dpg={MODEL}", "--batch-size", "4"])
    kept = [some for some in column(tmp_path / "run", "answers:dpg") if some]
    assert 0 < len(kept) < 8
    monkeypatch.setattr(model, "answers", usual)
    score.main([str(tmp_path / "run"), "--benchmarks", f"dpg={MODEL}"])
    assert [len(some) for some in column(tmp_path / "run", "answers:dpg")] == [0, 0, 6, 6, 6, 6, 4, 4, 5, 5]


def test_an_image_that_the_service_cannot_answer_about_is_left_out_and_told(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "run", TABLE, "dpg", seeds=2)
    monkeypatch.setattr(model, "answers", lambda found: [float("nan")] * len(found) if len(asked) < 7 else found)
    score.main([str(tmp_path / "run"), "--benchmarks", f"dpg={MODEL}"])
    out = capsys.readouterr().out
    assert "1 image left out: the service had no answer to some questions" in out
    assert np.isnan(column(tmp_path / "run", "score:dpg")[:3]).all()
    assert told_scores(out, "dpg")["overall"] > 0


def test_a_service_is_asked_about_images_that_are_drawn_again(tmp_path):
    draw(tmp_path / "run", TABLE, "dpg", seeds=2)
    flags = [str(tmp_path / "run"), "--benchmarks", f"dpg={MODEL}"]
    (tmp_path / "run/samples/0-1.png").rename(tmp_path / "run/away.png")
    score.main(flags)
    first = len(asked)
    assert column(tmp_path / "run", "answers:dpg")[3] is None and column(tmp_path / "run", "problem")[3] == "missing"
    (tmp_path / "run/away.png").rename(tmp_path / "run/samples/0-1.png")
    score.main(flags)
    assert len(asked) == first + 6 and len(column(tmp_path / "run", "answers:dpg")[3]) == 6


def test_questions_of_dpg_are_asked_as_they_are():
    record = read_prompts(TABLE)[3].record
    assert DPG.questions(record) == [question["question"] for question in record["questions"]]


def test_a_service_with_a_detector_is_told_the_metadata_and_answers_once(tmp_path, monkeypatch, capsys):
    metadata = HERE / "geneval_metadata.jsonl"
    draw(tmp_path / "run", metadata, "geneval", seeds=2)
    monkeypatch.setattr(
        model, "answers", lambda found: [1.0 if "cup" in text else 0.0 for text in asked[-len(found) :]]
    )
    score.main([str(tmp_path / "run"), "--benchmarks", f"geneval={MODEL}"])
    lines = metadata.read_text().splitlines()
    assert asked == [line for line in lines for _ in range(2)]
    assert told_scores(capsys.readouterr().out, "geneval")["color_attr"] == 1.0
    draw(tmp_path / "t2i", HERE / "t2i_compbench/dataset", "t2i_compbench")
    asked.clear()
    score.main([str(tmp_path / "t2i"), "--benchmarks", f"t2i_compbench={MODEL}"])
    assert json.loads(asked[0]) == {"prompt": "a green bench and a blue bowl", "category": "color"}
    assert told_scores(capsys.readouterr().out, "t2i_compbench")["numeracy"] == pytest.approx(0.5)
