import itertools
import json
import time

import pytest
from etils import epath
from preference_sets import encoded_image, examples, read_all, write_hpdv2, write_hpdv3

from flax_pref.data import json_rows
from flax_pref.data.hpd import HPDv2, HPDv3
from flax_pref.data.pairs import Drop, Judgement, Tie, combination


def opened(kind, file):
    return kind(epath.Path(file))


def change(file, row, **fields):
    """Replaces fields of a record; those that are ... are left out."""
    records = json.loads(file.read_text())
    records[row] = {name: value for name, value in (records[row] | fields).items() if value is not ...}
    file.write_text(json.dumps(records))
    return file


@pytest.fixture
def v2(tmp_path):
    return write_hpdv2(tmp_path / "v2", examples(4, ties=[2]))


@pytest.fixture
def v3(tmp_path):
    return write_hpdv3(tmp_path / "v3", examples(4))


@pytest.fixture
def ranked(tmp_path):
    """test.json, in which two prompts have three and two images."""
    records = [
        {"prompt": "a", "image_path": ["0.jpg", "1.jpg", "2.jpg"], "rank": [1.5, 3, 1.5], "raw_annotations": []},
        {"prompt": "b", "image_path": ["3.jpg", "4.jpg"], "rank": [2, 1], "raw_annotations": []},
    ]
    (tmp_path / "test").mkdir()
    for number in range(5):
        (tmp_path / "test" / f"{number}.jpg").write_bytes(encoded_image(number))
    (tmp_path / "test.json").write_text(json.dumps(records))
    return tmp_path / "test.json"


def test_hpdv2_tells_the_preferred_image_wherever_it_stands(v2):
    rows, reader = examples(4, ties=[2]), opened(HPDv2, v2)
    said, records = read_all(reader)
    assert said[1] == Judgement("caption 1", 1, ("00000001.jpg", "00000001-b.jpg"))
    assert said[2] == Tie() and list(records) == [0, 1, 3]
    for row, record in records.items():
        assert (record.caption, record.winner, record.loser) == rows[row][:3]
        assert record.winner_first == rows[row].winner_first
    assert reader.where(3) == (str(v2), 3)


def test_equal_labels_of_hpdv2_are_ties_and_others_mean_nothing(v2):
    for labels in ([1, 1], [0, 0], [0.5, 0.5]):
        assert list(opened(HPDv2, change(v2, 1, human_preference=labels)).judgements(range(1, 2))) == [Tie()]
    for labels in ([2, 0], [0.6, 0.4], [1], [1, 0, 0], "10", None, [True, False], [float("nan"), 0], [0.3, 0.3]):
        (drop,) = opened(HPDv2, change(v2, 1, human_preference=labels)).judgements(range(1, 2))
        assert drop.reason == "labels mean nothing" and drop.detail.startswith(json.dumps(labels)), drop


def test_each_two_images_that_hpdv2_ranks_are_a_row_and_the_lower_rank_wins(ranked):
    reader = opened(HPDv2, ranked)
    said, records = read_all(reader)
    assert said == [
        Judgement("a", 0, ("0.jpg", "1.jpg"), margin=1.5),
        Tie(),
        Judgement("a", 1, ("1.jpg", "2.jpg"), margin=1.5),
        Judgement("b", 1, ("3.jpg", "4.jpg"), margin=1.0),
    ]
    assert [reader.where(row)[1] for row in range(4)] == [0, 0, 0, 1]
    assert (records[2].winner, records[2].loser) == (encoded_image(2), encoded_image(1))
    assert records[2].winner_id == "2.jpg" and records[2].margin == 1.5 and not records[2].winner_first
    assert list(reader.judgements(range(2, 4))) == said[2:]
    assert list(reader.images([3])) == [(encoded_image(3), encoded_image(4))]


def test_rankings_of_any_number_of_images_give_each_two_of_them_once_in_order():
    for n in range(2, 40):
        assert [combination(n, i) for i in range(n * (n - 1) // 2)] == list(itertools.combinations(range(n), 2))
    n = 10**6
    assert combination(n, n * (n - 1) // 2 - 1) == (n - 2, n - 1) and combination(n, n - 1) == (1, 2)


def test_a_ranking_of_many_images_is_read_once_not_for_each_two_of_them(ranked, monkeypatch):
    n = 200
    record = {"prompt": "a", "image_path": [f"{i}.jpg" for i in range(n)], "rank": list(range(n, 0, -1))}
    ranked.write_text(json.dumps([record]))
    reader, parsed, real = opened(HPDv2, ranked), [], json_rows.json_object
    monkeypatch.setattr(json_rows, "json_object", lambda data: parsed.append(1) or real(data))
    begun = time.process_time()
    said = list(reader.judgements(range(len(reader))))
    assert time.process_time() - begun < 10  # a minute when each row parsed the record and counted up to its two images
    assert len(said) == n * (n - 1) // 2 and len(parsed) == 1
    assert said[n] == Judgement("a", 1, ("1.jpg", "3.jpg"), margin=2.0)


def test_ranks_that_mean_nothing_are_left_out_and_the_next_prompt_stays(ranked):
    for ranks in ([1, 2], [], None, [1, 2, 3, 4]):
        said, _ = read_all(opened(HPDv2, change(ranked, 0, rank=ranks)))
        assert [what.reason for what in said[:-1]] == ["ranks mean nothing"]
        assert said[-1].caption == "b"
    said, _ = read_all(opened(HPDv2, change(ranked, 0, rank=[1, None, 2])))
    assert [getattr(what, "reason", None) for what in said] == ["ranks mean nothing", None, "ranks mean nothing", None]
    said, _ = read_all(opened(HPDv2, change(ranked, 0, rank=[1, "2", 3])))
    assert said[0] == Drop("rank is no number", '"2"') and isinstance(said[1], Judgement)


def test_images_of_the_other_archive_with_the_same_names_are_not_taken(ranked):
    (ranked.parent / "train").mkdir()
    for number in range(5):
        (ranked.parent / "train" / f"{number}.jpg").write_bytes(b"of train.tar.gz")
    assert list(opened(HPDv2, ranked).images([3])) == [(encoded_image(3), encoded_image(4))]


def test_the_first_path_of_hpdv3_wins_and_its_place_is_drawn(tmp_path):
    rows = examples(40)
    reader = opened(HPDv3, write_hpdv3(tmp_path, rows))
    said, records = read_all(reader)
    assert all(what.winner == 0 for what in said) and reader.winner_listed_first
    assert all(records[row][1:4] == example[:3] for row, example in enumerate(rows))
    places = [record.winner_first for record in records.values()]
    assert 10 < sum(places) < 30
    assert places == [record.winner_first for record in read_all(reader)[1].values()]


def test_what_hpdv3_knows_of_a_judgement_is_told_and_null_is_unknown(v3):
    said, records = read_all(opened(HPDv3, v3))
    assert said[0] == Judgement("caption 0", 0, ("images/0-winner.jpg", "images/0-loser.jpg"), models=("sdxl", "sd15"))
    assert (said[1].confidence, said[1].margin) == (0.9, 0.8)
    assert (records[1].confidence, records[1].margin, records[0].confidence) == (0.9, 0.8, None)
    for votes, margin in (([3, 1], 0.5), ([0, 0], None), ([3], None), ([3, None], None), ("31", None), (..., None)):
        assert next(opened(HPDv3, change(v3, 0, choice_dist=votes)).judgements(range(1))).margin == margin
    assert next(opened(HPDv3, change(v3, 0, model1=None)).judgements(range(1))).models is None


@pytest.mark.parametrize(
    ("fields", "drop"),
    [
        ({"prompt": ""}, Drop("caption is empty", '""')),
        ({"prompt": None}, Drop("caption is empty", "null")),
        ({"prompt": 7}, Drop("caption is no text", "7")),
        ({"prompt": "half an emoji \ud83d"}, Drop("caption is no text", '"half an emoji \\ud83d"')),
        ({"prompt": "x" * 10_000}, Drop("caption is too long", "10000 characters; at most 5000")),
        ({"prompt": ...}, Drop("a field is missing", "prompt")),
        ({"path2": ...}, Drop("a field is missing", "path2")),
        ({"path1": None}, Drop("path is missing", "path1")),
        ({"path1": ["a"]}, Drop("path is no text", 'path1: ["a"]')),
        ({"path1": "a\0b"}, Drop("path is no text", 'path1: "a\\u0000b"')),
        ({"path1": "../../secret.jpg"}, Drop("path leaves the folder of the set", 'path1: "../../secret.jpg"')),
        ({"path2": "images/../../b.jpg"}, Drop("path leaves the folder of the set", 'path2: "images/../../b.jpg"')),
        ({"path2": "/etc/passwd"}, Drop("path leaves the folder of the set", 'path2: "/etc/passwd"')),
        ({"path2": "C:\\b.jpg"}, Drop("path leaves the folder of the set", 'path2: "C:\\\\b.jpg"')),
        ({"path2": "gs://b/b.jpg"}, Drop("path leaves the folder of the set", 'path2: "gs://b/b.jpg"')),
        ({"path1": "images/1-loser.jpg"}, Drop("both images are the same", "images/1-loser.jpg", damaged=False)),
        ({"confidence": float("nan")}, Drop("confidence is no number", "NaN")),
        ({"confidence": float("inf")}, Drop("confidence is no number", "Infinity")),
        ({"confidence": "high"}, Drop("confidence is no number", '"high"')),
        ({"confidence": 10**400}, Drop("confidence is no number", "1" + "0" * 59 + "...")),
        ({"choice_dist": [True, 1]}, Drop("choice_dist is no number", "true")),
        ({"model1": 5}, Drop("model is no text", '[5, "sd15"]')),
    ],
)
def test_a_damaged_record_is_left_out_with_the_reason_and_the_others_stay(v3, fields, drop):
    said, records = read_all(opened(HPDv3, change(v3, 1, **fields)))
    assert said[1] == drop
    assert list(records) == [0, 2, 3] and not any(isinstance(record, Drop) for record in records.values())


@pytest.mark.parametrize("write", [write_hpdv2, write_hpdv3])
def test_records_that_are_no_objects_or_not_utf8_are_left_out(tmp_path, write):
    file = write(tmp_path, examples(4))
    kind = {write_hpdv2: HPDv2, write_hpdv3: HPDv3}[write]
    records = json.loads(file.read_text())
    file.write_text(json.dumps([records[0], 7, records[2], records[3]]))
    assert read_all(opened(kind, file))[0][1] == Drop("no JSON object", "7")
    file.write_bytes(json.dumps(records).encode().replace(b"caption 1", b"caption \xff"))
    said, records = read_all(opened(kind, file))
    assert said[1].reason == "not UTF-8" and list(records) == [0, 2, 3]


def test_an_image_that_is_not_there_is_left_out_with_its_path(v3):
    (v3.parent / "images" / "1-loser.jpg").unlink()
    (v3.parent / "images" / "2-winner.jpg").unlink()
    (v3.parent / "images" / "2-winner.jpg").mkdir()
    _, records = read_all(opened(HPDv3, change(v3, 3, path2="images/" + "x" * 300)))
    assert records[1] == Drop("image is missing", "images/1-loser.jpg")
    assert records[2] == Drop("image is no regular file", "images/2-winner.jpg: a folder")
    assert records[3].reason == "image cannot be read" and records[3].detail.endswith("File name too long")


def test_texts_in_any_script_and_files_with_a_mark_or_spaces_are_read(v3):
    caption = "ein Bär, 一只熊, 🐻, \x85 \u2028"
    change(v3, 1, prompt=caption)
    records = json.loads(v3.read_text())
    for text in (json.dumps(records, ensure_ascii=False), json.dumps(records, indent=1) + "\n\r\t "):
        v3.write_bytes(b"\xef\xbb\xbf" + text.encode())
        reader = opened(HPDv3, v3)
        assert [what.caption for what in reader.judgements(range(4))] == [
            "caption 0",
            caption,
            "caption 2",
            "caption 3",
        ]
        assert list(reader.images([1, 3])) == [examples(4)[row].images[::-1] for row in (1, 3)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "begins with ''; expected a JSON list"),
        ('{"prompt": "a"}', r"begins with '{\"prompt\": \"a\"}'; expected a JSON list"),
        ("[]", "no records in it"),
        ('[{"prompt": "a"', "byte 1: not JSON"),
        ('[{"prompt": "a", "path1": "b", "path2": "c"}', "byte 44: not JSON .expected a comma"),
        ('[{"prompt": "a", "path1": "b", "path2": "c"},]', "byte 45: not JSON"),
        ('[{"prompt": "a", "path1": "b", "path2": "c"}] x', "byte 44: not JSON .something follows"),
        ("[" * 100_000, "byte 1: not JSON"),
        ('[{"prompt": "a", "path1": "b"}]', "row 0: no column 'path2'; there are 'prompt', 'path1', and HPDv3 has"),
        ("[7]", "row 0: no column 'prompt'; there are none"),
    ],
)
def test_a_list_that_is_damaged_or_has_another_schema_is_named(v3, content, message):
    v3.write_text(content)
    with pytest.raises(ValueError, match=rf"train\.json[:,] {message}") as caught:
        opened(HPDv3, v3)
    assert "\n" not in str(caught.value)


def test_each_column_of_hpdv2_that_is_missing_is_named(v2, ranked):
    for file, name in ((v2, "prompt"), (v2, "file_path"), (v2, "human_preference"), (ranked, "image_path")):
        whole = file.read_text()
        with pytest.raises(ValueError, match=rf"{file.name}, row 0: no column '{name}'; there are .*, and HPDv2 has"):
            opened(HPDv2, change(file, 0, **{name: ...}))
        file.write_text(whole)


def test_archives_that_were_not_extracted_are_named_with_the_command(v2, v3, ranked):
    for file, kind, command in (
        (v2, HPDv2, r"tar xzf train\.tar\.gz"),
        (ranked, HPDv2, r"tar xzf test\.tar\.gz"),
        (v3, HPDv3, r"cat images\.tar\.gz\.\* \| tar xz"),
    ):
        folder = file.parent / "elsewhere"
        folder.mkdir(exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
        with pytest.raises(FileNotFoundError, match=rf"{file.name}: its first images, as .* are not in .*: {command}"):
            opened(kind, folder / file.name)


def test_a_list_that_was_cut_while_it_is_read_is_named(v3):
    reader = opened(HPDv3, v3)
    v3.write_bytes(v3.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train\.json: ends in row 3, but was longer before"):
        list(reader.judgements(range(4)))
