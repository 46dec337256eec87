import contextlib
import json
import os
import socket

import pytest
from etils import epath
from preference_sets import examples, read_all, write_pair_folder

from flax_pref.data import json_rows
from flax_pref.data.pair_folder import PairFolder
from flax_pref.data.pairs import Drop, Judgement, Tie


@pytest.fixture
def folder(tmp_path):
    return write_pair_folder(tmp_path / "set", examples(4, ties=[2]))


def opened(folder):
    return PairFolder(epath.Path(folder))


def change(folder, row, **fields):
    """Replaces fields of a line; those that are ... are left out."""
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    record = {name: value for name, value in (json.loads(lines[row]) | fields).items() if value is not ...}
    lines[row] = json.dumps(record)
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


def test_pairs_and_ties_come_back_with_the_place_of_the_winner_drawn(folder):
    rows, reader = examples(4, ties=[2]), opened(folder)
    said, records = read_all(reader)
    assert said[0] == Judgement("caption 0", 0, ("images/0-winner.jpg", "images/0-loser.jpg"))
    assert said[2] == Tie() and list(records) == [0, 1, 3]
    assert all(record[1:4] == rows[row][:3] for row, record in records.items())
    assert reader.winner_listed_first and reader.where(1) == (str(folder / "pairs.jsonl"), 2)


def test_what_a_line_tells_beyond_the_pair_is_kept(folder):
    known = {
        "winner_id": "w",
        "loser_id": 17,
        "confidence": 1,
        "margin": -0.5,
        "models": ["sdxl", "sd15"],
        "tie": False,
    }
    change(folder, 1, prompt=..., caption="ein Bär 🐻", **known)
    said, records = read_all(opened(folder))
    assert said[1] == Judgement("ein Bär 🐻", 0, ("w", "17"), 1.0, -0.5, ("sdxl", "sd15"))
    assert (records[1].winner_id, records[1].loser_id, records[1].confidence) == ("w", "17", 1.0)


def test_blank_lines_are_no_rows_and_lines_keep_their_numbers(folder):
    file = folder / "pairs.jsonl"
    lines = file.read_text().splitlines()
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["", lines[0], " \t", lines[1], lines[3], ""]).encode())
    reader = opened(folder)
    assert [reader.where(row)[1] for row in range(len(reader))] == [2, 4, 5]
    assert [what.caption for what in reader.judgements(range(3))] == ["caption 0", "caption 1", "caption 3"]
    assert list(reader.images([2])) == [examples(4)[3][1:3]]
    assert [what.caption for what in reader.judgements(range(1, 3))] == ["caption 1", "caption 3"]


@pytest.mark.parametrize(
    ("line", "drop"),
    [
        (b'{"prompt": "a", "winner"', Drop("not JSON", "Expecting ':' delimiter")),
        (b"not JSON at all", Drop("not JSON", "Expecting value")),
        (b'{"prompt": "\xff"}', Drop("not UTF-8", "invalid start byte at its byte 12")),
        (b'["a", "b"]', Drop("no JSON object", '["a", "b"]')),
        (b"[" * 100_000, Drop("not JSON", "")),
    ],
)
def test_a_line_that_is_not_json_is_left_out_and_the_others_stay(folder, line, drop):
    file = folder / "pairs.jsonl"
    lines = file.read_bytes().splitlines()
    for row in (0, 1, 3):
        file.write_bytes(b"\n".join([*lines[:row], line, *lines[row + 1 :]]))
        reader = opened(folder)
        said, records = read_all(reader)
        assert said[row].reason == drop.reason and said[row].detail.startswith(drop.detail), said[row]
        assert len(said) == 4 and list(records) == [other for other in (0, 1, 3) if other != row]
        assert reader.where(row)[1] == row + 1


@pytest.mark.parametrize(
    ("fields", "drop"),
    [
        ({"prompt": ...}, Drop("caption is empty", "null")),
        ({"prompt": " "}, Drop("caption is empty", '" "')),
        ({"prompt": "x" * 10_000}, Drop("caption is too long", "10000 characters; at most 5000")),
        ({"winner": ...}, Drop("a field is missing", "winner")),
        ({"loser": ""}, Drop("path is missing", "loser")),
        ({"loser": "../loser.jpg"}, Drop("path leaves the folder of the set", 'loser: "../loser.jpg"')),
        ({"winner": "/tmp/winner.jpg"}, Drop("path leaves the folder of the set", 'winner: "/tmp/winner.jpg"')),
        (
            {"winner": "images\\..\\..\\x"},
            Drop("path leaves the folder of the set", 'winner: "images\\\\..\\\\..\\\\x"'),
        ),
        ({"winner": "images/1-loser.jpg"}, Drop("both images are the same", "images/1-loser.jpg", damaged=False)),
        ({"winner_id": None}, Drop("id is missing", "winner_id")),
        ({"loser_id": True}, Drop("id is no text", "loser_id: true")),
        ({"confidence": [1]}, Drop("confidence is no number", "[1]")),
        ({"margin": float("nan")}, Drop("margin is no number", "NaN")),
        ({"models": ["sdxl"]}, Drop("models are not two", '["sdxl"]')),
        ({"tie": "yes"}, Drop("labels mean nothing", 'tie: "yes"; expected true or false')),
        ({"tie": [1]}, Drop("labels mean nothing", "tie: [1]; expected true or false")),
    ],
)
def test_a_damaged_record_is_left_out_with_the_reason_and_the_others_stay(folder, fields, drop):
    said, records = read_all(opened(change(folder, 1, **fields)))
    assert said[1] == drop and list(records) == [0, 3]


def test_an_image_that_is_not_there_is_left_out_with_its_path(folder):
    (folder / "images" / "1-winner.jpg").unlink()
    _, records = read_all(opened(folder))
    assert records[1] == Drop("image is missing", "images/1-winner.jpg") and records[3].winner == examples(4)[3].winner


def test_only_regular_files_within_the_folder_are_opened_and_all_else_is_a_drop(folder, monkeypatch):
    image, outside = folder / "images" / "1-winner.jpg", folder.parent / "outside.jpg"
    image.rename(outside)

    def drop():
        records = read_all(opened(folder))[1]
        assert list(records) == [0, 1, 3] and not isinstance(records[0], Drop) and not isinstance(records[3], Drop)
        return records[1]

    image.mkdir()
    assert drop() == Drop("image is no regular file", "images/1-winner.jpg: a folder")
    image.rmdir()
    os.mkfifo(image)
    assert drop() == Drop("image is no regular file", "images/1-winner.jpg: a FIFO")
    image.unlink()
    with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(image.parent):
        bound.bind(image.name)
    assert drop() == Drop("image is no regular file", "images/1-winner.jpg: a socket")
    image.unlink()
    for target in (outside, "/dev/zero", "../../outside.jpg", "/proc/self/environ"):
        image.symlink_to(target)
        assert drop().reason == "path leaves the folder of the set"
        assert drop().detail == f"images/1-winner.jpg: a link to {os.path.realpath(image)}"
        image.unlink()
    image.symlink_to(image.name)
    assert drop().reason == "image cannot be read"
    image.unlink()
    image.symlink_to("0-winner.jpg")
    assert drop().winner == (folder / "images" / "0-winner.jpg").read_bytes()
    monkeypatch.setattr(json_rows, "MOST_BYTES", 5000)
    image.unlink()
    image.write_bytes(bytes(5001))
    assert drop() == Drop("image is too large", "images/1-winner.jpg: more than 5000 bytes")


def test_the_folder_itself_may_be_a_link(folder):
    (folder.parent / "link").symlink_to(folder)
    assert read_all(opened(folder.parent / "link"))[1][3].winner == examples(4)[3].winner


def test_a_folder_without_pairs_and_other_fields_are_named(folder):
    for name in ("prompt", "winner", "loser"):
        whole = (folder / "pairs.jsonl").read_text()
        with pytest.raises(ValueError, match=rf"pairs\.jsonl, line 1: no column '{name}'; there are .* has 'prompt'"):
            opened(change(folder, 0, **{name: ..., "chosen": "x"}))
        (folder / "pairs.jsonl").write_text(whole)
    (folder / "pairs.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl: no records in it"):
        opened(folder)
    (folder / "pairs.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"pairs\.jsonl: no such file; expected lines of JSON with prompt"):
        opened(folder)
