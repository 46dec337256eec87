import gzip
import io
import json
import re
import subprocess
import tarfile

import pytest
from etils import epath
from preference_sets import encoded_image, examples, read_all, tar_of, write_tars

from flax_pref.data import webdataset
from flax_pref.data.pairs import Drop, Judgement, Tie
from flax_pref.data.webdataset import Tars


def opened(*files):
    return Tars([epath.Path(file) for file in files])


def sample(key, caption="a cat", **described):
    members = [(f"{key}.winner.jpg", b"winner of " + key.encode()), (f"{key}.loser.png", b"loser of " + key.encode())]
    described = [(f"{key}.json", json.dumps(described).encode())] if described else []
    return [*members, *described, (f"{key}.txt", caption.encode())]


@pytest.fixture
def write(tmp_path):
    def write(*members, name="a.tar"):
        (tmp_path / name).write_bytes(tar_of(members))
        return tmp_path / name

    return write


def only_middle_is_dropped(file):
    """The drop of the second of three samples."""
    said, records = read_all(opened(file))
    assert len(said) == 3 and list(records) == [0, 2], said
    assert (records[0].winner, records[2].winner) == (b"winner of a", b"winner of c")
    return said[1]


def test_labels_tell_the_winner_and_ties(tmp_path):
    rows = examples(5, ties=[3])
    folder = write_tars(tmp_path, rows)
    reader = opened(*sorted(folder.iterdir()))
    said, records = read_all(reader)
    assert said[1] == Judgement("caption 1", 1, ("00000.tar/000001.0", "00000.tar/000001.1"))
    assert said[3] == Tie() and list(records) == [0, 1, 2, 4] and not reader.winner_listed_first
    for row, record in records.items():
        assert record[1:4] == rows[row][:3] and record.winner_first == rows[row].winner_first
    assert reader.where(4) == (str(folder / "00001.tar"), 1)
    for start in range(5):
        for end in range(start, 6):
            assert list(reader.judgements(range(start, end))) == said[start:end]
    assert list(reader.images([0, 3, 4])) == [rows[row].images for row in (0, 3, 4)]


def test_samples_that_name_their_winner_have_its_place_drawn(tmp_path):
    rows = examples(4)
    reader = opened(*sorted(write_tars(tmp_path, rows, labelled=False).iterdir()))
    said, records = read_all(reader)
    assert said[1] == Judgement("caption 1", 0, ("00000.tar/000001.winner", "00000.tar/000001.loser"))
    assert reader.winner_listed_first and all(records[row][1:4] == example[:3] for row, example in enumerate(rows))


def test_what_the_json_of_a_sample_tells_is_kept(write):
    known = {"confidence": 0.5, "margin": 2}
    named = {"winner_id": "w", "loser_id": "l", "models": ["sdxl", "sd15"], "prompt": "not this"}
    labelled = {"label_0": 0, "label_1": 1, "image_0_uid": "x", "image_1_uid": "y", "model_0": "m", "model_1": "n"}
    file = write(
        *sample("a", "ein Bär\n", **known, **named),
        ("b.0.webp", b"0"),
        ("b.JSON", json.dumps({"caption": "a dog", **labelled}).encode()),
        ("b.1.JPEG", b"1"),
    )
    said, records = read_all(opened(file))
    assert said[0] == Judgement("ein Bär", 0, ("w", "l"), 0.5, 2.0, ("sdxl", "sd15"))
    assert said[1] == Judgement("a dog", 1, ("x", "y"), models=("m", "n"))
    assert (records[1].winner, records[1].loser) == (b"1", b"0")


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_any_kind_with_folders_long_names_and_other_members_are_read(tmp_path, tar_format):
    folder = tmp_path / "set" / ("deep/" * 25 + "ä")
    folder.mkdir(parents=True)
    for key in ("0001", "0002"):
        for name, content in [*sample(key), (f"{key}.cls", b"7"), (f".{key}.swp", b"hidden")]:
            (folder / name).write_bytes(content)
    with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as tar:
        for path in sorted((tmp_path / "set").rglob("*")):
            tar.add(path, arcname=f"./{path.relative_to(tmp_path / 'set')}", recursive=False)
    said, records = read_all(opened(tmp_path / "a.tar"))
    key = "deep/" * 25 + "ä/0002"
    assert said[1] == Judgement("a cat", 0, (f"a.tar/{key}.winner", f"a.tar/{key}.loser"))
    assert [record.loser for record in records.values()] == [b"loser of 0001", b"loser of 0002"]


@pytest.mark.parametrize(
    "name", ["../b.loser.png", "/b.loser.png", "/tmp/../b.loser.png", "x/../../b.loser.png", "C:\\b.loser.png"]
)
def test_an_entry_that_would_leave_the_archive_drops_its_sample_and_names_it(write, name):
    members = [(name if part == "b.loser.png" else part, content) for part, content in sample("b")]
    said, records = read_all(opened(write(*sample("a"), *members, *sample("c"))))
    drops = [what for what in said if isinstance(what, Drop)]
    assert Drop("path of an entry leaves the archive", ascii(name)) in drops
    assert [record.winner for record in records.values()] == [b"winner of a", b"winner of c"]
    if name in ("../b.loser.png", "/b.loser.png"):
        assert len(said) == 3


def test_a_folder_in_the_place_of_an_image_and_a_huge_entry_drop_one_sample(write, monkeypatch):
    folder = tarfile.TarInfo("b.winner.jpg")
    folder.type = tarfile.DIRTYPE
    drop = only_middle_is_dropped(write(*sample("a"), (folder, b""), *sample("b")[1:], *sample("c")))
    assert drop == Drop("a part is missing", "b: loser, txt; expected winner and loser, or 0 and 1")
    monkeypatch.setattr(webdataset, "MOST_BYTES", 4000)
    for member in (("b.winner.jpg", bytes(4001)), ("b.txt", b"x" * 4001)):
        others = [other for other in sample("b") if other[0] != member[0]]
        drop = only_middle_is_dropped(write(*sample("a"), *others, member, *sample("c")))
        assert drop == Drop("entry is too large", f"'{member[0]}': 4001 bytes; at most 4000")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_an_entry_that_is_no_file_drops_its_sample_and_names_it(write, kind):
    link = tarfile.TarInfo("b.loser.png")
    link.type, link.linkname = kind, "/etc/passwd"
    members = [(link, b"") if name == "b.loser.png" else (name, content) for name, content in sample("b")]
    drop = only_middle_is_dropped(write(*sample("a"), *members, *sample("c")))
    assert drop == Drop("entry is no plain file", "'b.loser.png'")


@pytest.mark.parametrize(
    ("members", "drop"),
    [
        (sample("b")[1:], Drop("a part is missing", "b: loser, txt; expected winner and loser, or 0 and 1")),
        (sample("b")[::2], Drop("a part is missing", "b: winner, txt; expected winner and loser, or 0 and 1")),
        (sample("b")[:2], Drop("a part is missing", "b: winner, loser; expected json, or txt for winner and loser")),
        ([("b.md", b"")], Drop("a part is missing", "b: nothing; expected winner and loser, or 0 and 1")),
        (
            [("b.0.jpg", b""), ("b.1.jpg", b""), ("b.txt", b"b")],
            Drop("a part is missing", "b: 0, 1, txt; expected json"),
        ),
        ([*sample("b"), ("b.winner.png", b"")], Drop("a part is there twice", "b: winner")),
        (sample("b") * 2, Drop("a part is there twice", "b: winner")),
        ([*sample("b"), ("b.0.png", b"")], Drop("a part is there twice", "b: winner, loser, txt, 0; expected")),
        ([*sample("b")[:2], ("b.winner.gif", b"")], Drop("a part is missing", "b: winner, loser")),
        (sample("b", " "), Drop("caption is empty", '" "')),
        (sample("b", "x" * 10_000), Drop("caption is too long", "10000 characters; at most 5000")),
        (
            [*sample("b")[:2], ("b.txt", b"\xff")],
            Drop("caption is no text", "not UTF-8: invalid start byte at its byte 0"),
        ),
        ([*sample("b")[:2], ("b.json", b"{}")], Drop("caption is empty", "null")),
        ([*sample("b")[:2], ("b.json", b"{")], Drop("not JSON", "")),
        ([*sample("b"), ("b.json", b"[7]")], Drop("no JSON object", "[7]")),
        (sample("b", confidence=float("nan")), Drop("confidence is no number", "NaN")),
        (sample("b", margin="1"), Drop("margin is no number", '"1"')),
        (sample("b", winner_id=None), Drop("id is missing", "winner_id")),
        (sample("b", models="sdxl"), Drop("models are not two", '"sdxl"')),
        (
            [("b.0.jpg", b""), ("b.1.jpg", b""), ("b.json", b'{"label_0": 0.7, "label_1": 0.3}'), ("b.txt", b"b")],
            Drop("labels mean nothing", "[0.7, 0.3]"),
        ),
        (
            [("b.0.jpg", b""), ("b.1.jpg", b""), ("b.json", b"{}"), ("b.txt", b"b")],
            Drop("labels mean nothing", "[null"),
        ),
    ],
)
def test_a_damaged_sample_is_left_out_with_the_reason_and_the_others_stay(write, members, drop):
    found = only_middle_is_dropped(write(*sample("a"), *members, *sample("c")))
    assert found.reason == drop.reason and found.detail.startswith(drop.detail), found


def test_names_that_are_not_utf8_do_not_stop_the_set(tmp_path, write):
    file = write(*sample("a"), *sample("bb"), *sample("c"))
    data = bytearray(file.read_bytes())
    for place in [place for place in range(0, len(data), 512) if data[place : place + 3] == b"bb."]:
        header = bytearray(data[place : place + 512])
        header[:2], header[148:156] = b"\xff\xfe", b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[place : place + 512] = header
    file.write_bytes(data)
    assert only_middle_is_dropped(file).reason == "id is no text"


def test_truncated_and_damaged_tars_are_named_when_they_are_opened(write):
    file = write(*sample("a"), *sample("b"), *sample("c"))
    whole = file.read_bytes()
    used = 3 * 3 * 1024
    assert whole[used:].count(0) == len(whole) - used
    for size in [*range(1, used, 300), used - 1, used]:
        file.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"a\.tar: truncated, damaged or no tar file \(.*\); download it"
        ) as caught:
            opened(file)
        assert "\n" not in str(caught.value)
    for place in range(0, used, 1024):
        file.write_bytes(whole[:place] + b"x" + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"a\.tar: truncated, damaged or no tar file"):
            opened(file)
    for data in (b"", b"no tar file" * 100, encoded_image(0)):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.tar: truncated, damaged or no tar file"):
            opened(file)


def test_compressed_and_empty_tars_are_named(write, tmp_path):
    file = write(*sample("a"))
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.tar\.gz: compressed with gzip, but .*; decompress it"):
        opened(packed)
    empty = write(name="empty.tar")
    with pytest.raises(ValueError, match=r"empty\.tar: no samples; expected members such as 7\.winner\.jpg"):
        opened(empty)
    assert len(opened(empty, file, empty)) == 1 and opened(empty, file, empty).where(0) == (str(file), 0)


def test_a_tar_that_was_cut_while_it_is_read_is_named(write):
    file = write(*sample("a"), *sample("b"))
    reader = opened(file)
    file.write_bytes(file.read_bytes()[:3500])
    with pytest.raises(ValueError, match=r"a\.tar: ends in sample b, but was longer before"):
        list(reader.images([0, 1]))


# ----------------------------------------------------------------------------------------------------------------------
# Where a tar file ends


def many(count=200, tar_format=tarfile.GNU_FORMAT, folder=""):
    return tar_of([member for i in range(count) for member in sample(f"{folder}{i:04d}")], tar_format)


def used(data):
    """Bytes before the end mark."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        *_, last = tar
    return last.offset_data + -(-last.size // 512) * 512


def refused(file, data, reason):
    file.write_bytes(data)
    with pytest.raises(
        ValueError, match=rf"^{file}: truncated, damaged or no tar file \({reason}.*\); download it again$"
    ):
        opened(file)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_block_of_zeros_anywhere_is_never_taken_for_the_end(tmp_path, tar_format):
    folder = "deep/" * 25 + ("" if tar_format == tarfile.USTAR_FORMAT else "ä" * 120 + "/")
    whole, file = many(4, tar_format, folder), tmp_path / "a.tar"
    file.write_bytes(whole)
    said, records = read_all(opened(file))
    assert len(said) == 4 and not any(isinstance(what, Drop) for what in said)
    stopped = 0
    for place in range(0, used(whole), 512):
        file.write_bytes(whole[:place] + bytes(512) + whole[place + 512 :])
        try:
            now, changed = read_all(opened(file))
        except ValueError as error:
            assert re.search(rf"{file}: truncated, .* at byte \d+", str(error))
            stopped += 1
        else:
            known = {what.ids[0] for what in now if isinstance(what, Judgement)}
            assert len(now) >= 4 and known <= {what.ids[0] for what in said}
            assert any(isinstance(what, Drop) for what in now) or changed != records
    assert stopped >= 12


def test_half_a_set_behind_an_end_mark_is_not_lost(tmp_path):
    whole, file = many(), tmp_path / "a.tar"
    for row in (0, 50, 199):
        place = row * 3 * 1024
        reason = f"an end mark at byte {place}, but at byte {place + 512} more follows"
        refused(file, whole[:place] + bytes(512) + whole[place + 512 :], reason)
    end = used(whole)
    refused(file, whole + whole, f"an end mark at byte {end}, but at byte {len(whole)} more follows")
    refused(file, whole + b"x", f"an end mark at byte {end}, but at byte {len(whole)} more follows")
    # A download that reserved its space and stopped: in a content, in a padding, before a header, in a header.
    for place in (100 * 3072 + 515, 100 * 3072 + 600, 100 * 3072, 100 * 3072 + 1024):
        refused(
            file,
            whole[:place].ljust(len(whole), b"\0"),
            r"an end mark at byte \d+ and 3\d{5} bytes of zeros, more than",
        )
    refused(file, whole[: 100 * 3072 + 20].ljust(len(whole), b"\0"), "no header and no end at byte 307200")
    refused(file, whole + bytes(20_480), rf"an end mark at byte {end} and {len(whole) + 20_480 - end} bytes of zeros")


@pytest.mark.parametrize("factor", [1, 2, 7, 19, 20, 40, 64, 128, 512, 2048])
def test_tars_of_any_blocking_factor_are_whole(tmp_path, factor):
    """Written by tar itself; so are its counts of members."""
    (tmp_path / "set").mkdir()
    for name, content in [*sample("a"), *sample("b")]:
        (tmp_path / "set" / name).write_bytes(content)
    subprocess.run(["tar", "-b", str(factor), "--sort=name", "-cf", "../a.tar", "."], cwd=tmp_path / "set", check=True)
    assert (tmp_path / "a.tar").stat().st_size % (factor * 512) == 0
    assert len(read_all(opened(tmp_path / "a.tar"))[1]) == 2


def test_a_tar_may_end_with_the_last_of_its_two_blocks_or_one(tmp_path):
    whole = many(2)
    for zeros in (512, 1024):
        (tmp_path / "a.tar").write_bytes(whole[: used(whole) + zeros])
        assert len(opened(tmp_path / "a.tar")) == 2
