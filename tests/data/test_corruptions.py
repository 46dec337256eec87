"""Sets of every layout, damaged in every way that a seed can draw: nothing is lost without a word."""

import collections
import io
import json
import random
import struct
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from preference_sets import (
    encoded_image,
    examples,
    read_all,
    tar_of,
    write_hpdv2,
    write_hpdv3,
    write_pair_folder,
    write_pick_a_pic,
    write_tars,
)

from flax_pref.data.images import decode_image
from flax_pref.data.pairs import Drop, Judgement, Tie
from flax_pref.data.sources import Source, open_source

ROWS = examples(5, ties=[3])
SEEDS = 8  # of each kind of damage in each layout
WRITERS = {
    "pick_a_pic": write_pick_a_pic,
    "hpdv2": write_hpdv2,
    "hpdv3": write_hpdv3,
    "folder": write_pair_folder,
    "webdataset": write_tars,
}
# What may become of a set: the damaged row is dropped, or it is a valid pair of other content, or the file is refused.
DROPPED, CHANGED, STOPPED, SAME = "dropped", "changed", "stopped", "same"


def image_files(rng):
    """Bytes that are no image to train on."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    ihdr = b"\0\0\0\rIHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return [
        b"",
        b"<html>404 Not Found</html>",
        rng.randbytes(1000),
        b"\xff\xd8\xff" + rng.randbytes(1000),
        b"\x89PNG\r\n\x1a\n" + ihdr,
        encoded_image(0, (1, 1)),
        encoded_image(0, (400, 20), "PNG"),
        encoded_image(0, (40, 48), "GIF"),
    ]


def unusual_images(rng):
    """Images that few sets have, but that are whole."""
    for mode, image_format in (("CMYK", "JPEG"), ("L", "JPEG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("P", "PNG")):
        image = Image.open(io.BytesIO(encoded_image(rng.randrange(99), (40, 48), "PNG"))).convert(mode)
        file = io.BytesIO()
        image.save(file, image_format)
        yield file.getvalue()
    file = io.BytesIO()
    Image.fromarray(np.full((40, 48), rng.randrange(65536), np.uint16)).save(file, "PNG")
    yield file.getvalue()


def flipped(data, rng, start=0):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 4])):
        data[rng.randrange(start, len(data))] ^= rng.randrange(1, 256)
    return bytes(data)


def with_image(change):
    """Damage to the bytes of an image, the same in all layouts."""

    def corrupt(layout, folder, rng):
        row, name = rng.choice([0, 1, 2, 4]), rng.choice(["winner", "loser"])
        rows = list(ROWS)
        rows[row] = rows[row]._replace(**{name: change(getattr(rows[row], name), rng)})
        WRITERS[layout](folder, rows)
        return row

    return corrupt


def with_caption(layout, folder, rng):
    row = rng.choice([0, 1, 2, 4])
    rows = list(ROWS)
    rows[row] = rows[row]._replace(caption=rng.choice(["", " ", "\n\t", "x" * 5001, "\u00e4" * 10_000]))
    WRITERS[layout](folder, rows)
    return row


def with_fields(choices):
    """Damage to the fields of a record."""

    def corrupt(layout, folder, rng):
        WRITERS[layout](folder, ROWS)
        row = rng.choice([1, 2, 4])
        set_fields(layout, folder, row, rng.choice(choices[layout]))
        return row

    return corrupt


LABELS = {
    "pick_a_pic": [
        {"label_0": 0.7},
        {"label_0": 2.0},
        {"label_1": None},
        {"label_0": float("nan")},
        {"has_label": False},
    ],
    "hpdv2": [{"human_preference": value} for value in ([0.7, 0.3], [2, 0], [1], None, "10", [None, 1], [[1], 0])],
    "hpdv3": [{"confidence": value} for value in ("high", float("nan"), float("-inf"), [1], {}, True)],
    "folder": [{"tie": value} for value in ("yes", 7, [], {})] + [{"confidence": "x"}, {"margin": float("nan")}],
    "webdataset": [{"label_0": 0.7}, {"label_0": 2}, {"label_1": None}, {"label_0": "1"}, {"label_1": float("inf")}],
}
OTHER_FIELDS = {
    "pick_a_pic": [{"caption": None}, {"image_0_uid": None}, {"image_1_uid": ""}, {"are_different": False}],
    "hpdv2": [{"prompt": None}, {"prompt": 7}, {"prompt": "\ud83d"}, {"file_path": ["a"]}, {"file_path": "ab"}],
    "hpdv3": [
        {"prompt": None},
        {"path1": 7},
        {"path2": None},
        {"path1": "\ud83d"},
        {"model1": 3},
        {"choice_dist": [{}, 1]},
    ],
    "folder": [
        {"prompt": []},
        {"winner": None},
        {"loser": {}},
        {"winner_id": None},
        {"loser_id": "\ud83d"},
        {"models": 3},
    ],
    "webdataset": [
        {"image_0_uid": None},
        {"image_1_uid": []},
        {"margin": "x"},
        {"confidence": {}},
        {"model_0": 1, "model_1": 2},
    ],
}
OUTSIDE = ("../../outside.jpg", "images/../../outside.jpg", "/outside.jpg", "C:\\outside.jpg", "..\\outside.jpg")
PATHS = {
    "hpdv2": [{"file_path": [path, "b.jpg"]} for path in OUTSIDE],
    "hpdv3": [{"path2": path} for path in OUTSIDE],
    "folder": [{"loser": path} for path in OUTSIDE],
}
ABSENT = {
    "hpdv2": [{"prompt": ...}, {"file_path": ...}, {"human_preference": ...}],
    "hpdv3": [{"prompt": ...}, {"path1": ...}, {"path2": ...}],
    "folder": [{"prompt": ...}, {"winner": ...}, {"loser": ...}],
    "webdataset": [{"label_0": ...}, {"label_1": ...}],
}


def set_fields(layout, folder, row, fields):
    def changed(record):
        return {name: value for name, value in (record | fields).items() if value is not ...}

    if layout == "pick_a_pic":
        file, row = parquet_of(folder, row)
        table = pq.read_table(file)
        records = table.to_pylist()
        records[row] |= fields
        pq.write_table(pa.Table.from_pylist(records, table.schema), file)
    elif layout == "webdataset":
        change_members(folder, row, lambda name, data: (name, json.dumps(changed(json.loads(data))).encode()), "json")
    elif layout == "folder":
        lines = (folder / "pairs.jsonl").read_text().splitlines()
        lines[row] = json.dumps(changed(json.loads(lines[row])))
        (folder / "pairs.jsonl").write_text("\n".join(lines))
    else:
        records = json.loads((folder / "train.json").read_text())
        records[row] = changed(records[row])
        (folder / "train.json").write_text(json.dumps(records))


def parquet_of(folder, row):
    """The file that a row is in, and its place there."""
    files = sorted((folder / "data").iterdir())
    return files[row // 3], row % 3


def change_members(folder, row, change, *suffixes):
    """Changes those members of a sample that end in one of the suffixes; None leaves one out."""
    file = folder / f"{row // 3:05d}.tar"
    members = []
    with tarfile.open(file) as tar:
        for info in tar:
            member = info.name, tar.extractfile(info).read()
            if info.name.startswith(f"{row:06d}.") and info.name.endswith(suffixes):
                member = change(*member)
            members += [] if member is None else [member]
    file.write_bytes(tar_of(members))


def with_missing_image(layout, folder, rng):
    WRITERS[layout](folder, ROWS)
    row = rng.choice([0, 1, 2, 4])
    if layout == "pick_a_pic":
        set_fields(layout, folder, row, {rng.choice(["jpg_0", "jpg_1"]): None})
    elif layout == "webdataset":
        change_members(folder, row, lambda name, data: None, rng.choice(["0.jpg", "1.jpg"]))
    else:
        names = {"hpdv2": "train/{:08d}*.jpg"}.get(layout, "images/{}-*.jpg")
        rng.choice(sorted(folder.glob(names.format(row)))).unlink()
    return row


def with_damaged_json(layout, folder, rng):
    """Other bytes anywhere in a record."""
    WRITERS[layout](folder, ROWS)
    row = rng.choice([1, 2, 4])
    if layout == "webdataset":
        change_members(folder, row, lambda name, data: (name, flipped(data, rng)), "json")
        return row
    file = folder / ("pairs.jsonl" if layout == "folder" else "train.json")
    whole = file.read_bytes()
    records = json.loads(whole) if layout != "folder" else [json.loads(line) for line in whole.splitlines()]
    text = json.dumps(records[row]).encode()
    damaged = flipped(text, rng).replace(b"\n", b"?")
    file.write_bytes(whole.replace(text, damaged if rng.random() < 0.7 else text[: rng.randrange(1, len(text))], 1))
    return row


def with_first_record_of_other_columns(layout, folder, rng):
    WRITERS[layout](folder, ROWS)
    if layout == "pick_a_pic":
        file = rng.choice(sorted((folder / "data").iterdir()))
        table = pq.read_table(file)
        name = rng.choice(
            ["caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label", "image_0_uid", "image_1_uid"]
        )
        pq.write_table(table.rename_columns({name: f"{name}_"}), file)
    else:
        set_fields(layout, folder, 0, rng.choice(ABSENT[layout]))
    return 0


def with_truncated_file(layout, folder, rng):
    WRITERS[layout](folder, ROWS)
    names = {"pick_a_pic": "data/*.parquet", "webdataset": "*.tar", "folder": "pairs.jsonl"}
    file = rng.choice(sorted(folder.glob(names.get(layout, "train.json"))))
    whole = file.read_bytes()
    # Lines that a file of lines lacks are not missed, but the one that is cut is.
    start = whole.rstrip(b"\n").rindex(b"\n") + 2 if layout == "folder" else 0
    end = len(whole.rstrip(b"\n")) if layout == "folder" else len(whole.rstrip(b"\0"))
    file.write_bytes(whole[: rng.randrange(start, end)])
    return 4


def with_damaged_header(layout, folder, rng):
    WRITERS[layout](folder, ROWS)
    file = rng.choice(sorted(folder.glob("*.tar")))
    with tarfile.open(file) as tar:
        header = rng.choice([info.offset for info in tar])
    data = bytearray(file.read_bytes())
    data[header + rng.randrange(512)] ^= rng.randrange(1, 256)
    file.write_bytes(data)
    return None


def with_strange_entry(layout, folder, rng):
    WRITERS[layout](folder, ROWS)
    row = rng.choice([0, 1, 2, 4])
    link = tarfile.TarInfo(f"{row:06d}.0.jpg")
    link.type, link.linkname = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE]), "/etc/passwd"
    changes = [
        lambda name, data: (f"../{name}", data),
        lambda name, data: (f"/{name}", data),
        lambda name, data: (f"/../{name}", data),
        lambda name, data: (name.replace("0.jpg", "1.jpg"), data),
        lambda name, data: (name.replace("0.jpg", "0.gif"), data),
        lambda name, data: (name.replace("0.jpg", "winner.jpg"), data),
        lambda name, data: (link, b""),
    ]
    change_members(folder, row, rng.choice(changes), "0.jpg")
    return row


def with_damaged_column(layout, folder, rng):
    """Other bytes where a column of a row group begins."""
    WRITERS[layout](folder, ROWS)
    file = rng.choice(sorted((folder / "data").iterdir()))
    footer, data = pq.read_metadata(file), bytearray(file.read_bytes())
    name = rng.choice(["caption", "has_label", "image_0_uid", "jpg_0", "jpg_1", "label_1"])
    column = footer.row_group(0).column(footer.schema.to_arrow_schema().names.index(name))
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 8] = b"\xff" * 8
    file.write_bytes(data)
    return None


ALL = tuple(WRITERS)
JSON = ("hpdv2", "hpdv3", "folder")
KINDS = {
    "image: other bytes": (with_image(flipped), ALL, {DROPPED, CHANGED}),
    "image: truncated": (with_image(lambda data, rng: data[: rng.randrange(len(data) - 50)]), ALL, {DROPPED}),
    "image: none, a bomb, or too small": (with_image(lambda _, rng: rng.choice(image_files(rng))), ALL, {DROPPED}),
    "image: unusual": (with_image(lambda _, rng: rng.choice(list(unusual_images(rng)))), ALL, {CHANGED}),
    "image: missing": (with_missing_image, ALL, {DROPPED}),
    "caption": (with_caption, ALL, {DROPPED}),
    "label": (with_fields(LABELS), ALL, {DROPPED}),
    "another field": (with_fields(OTHER_FIELDS), ALL, {DROPPED}),
    "path": (with_fields(PATHS), JSON, {DROPPED}),
    "field: missing": (with_fields(ABSENT), (*JSON, "webdataset"), {DROPPED}),
    "JSON: other bytes": (with_damaged_json, (*JSON, "webdataset"), {DROPPED, CHANGED, STOPPED, SAME}),
    "columns": (with_first_record_of_other_columns, ("pick_a_pic", *JSON), {STOPPED}),
    "file: truncated": (with_truncated_file, ALL, {STOPPED, DROPPED}),
    "tar: header": (with_damaged_header, ("webdataset",), {STOPPED, SAME}),
    "tar: entry": (with_strange_entry, ("webdataset",), {DROPPED}),
    "parquet: column": (with_damaged_column, ("pick_a_pic",), {STOPPED}),
}


def outcome(layout, folder, pristine, touched):
    """Reads all of a damaged set and checks what holds whatever the damage is."""
    try:
        reader = open_source(Source(layout=layout, path=str(folder)))
        said, records = read_all(reader)
    except ValueError as error:
        assert type(error) is ValueError, repr(error)
        assert str(folder) in str(error) and "\n" not in str(error), error
        return STOPPED
    decoded = {
        row: [record] if isinstance(record, Drop) else [decode_image(record.winner), decode_image(record.loser)]
        for row, record in records.items()
    }
    drops = [what for what in said if isinstance(what, Drop)]
    drops += [next(filter(lambda i: isinstance(i, Drop), images)) for images in decoded.values() if dropped(images)]
    pairs = sum(not dropped(images) for images in decoded.values())
    assert len(pristine[0]) == len(reader) == pairs + said.count(Tie()) + len(drops)
    assert all(drop.reason and "\n" not in drop.reason + drop.detail for drop in drops)
    for row, (now, before) in enumerate(zip(said, pristine[0], strict=True)):
        if row != touched:
            assert now == before and records.get(row) == pristine[1].get(row)
            assert row not in decoded or not dropped(decoded[row])
    if touched is None or (said[touched] == pristine[0][touched] and records.get(touched) == pristine[1].get(touched)):
        return SAME
    if isinstance(said[touched], Drop) or dropped(decoded.get(touched, [])):
        return DROPPED
    assert isinstance(said[touched], (Judgement, Tie))
    return CHANGED


def dropped(images):
    return any(isinstance(image, Drop) for image in images)


def test_no_damage_is_silent_and_none_stops_a_set_without_the_name_of_its_file(tmp_path):
    counts = collections.Counter()
    for layout, write in WRITERS.items():
        pristine = read_all(open_source(Source(layout=layout, path=str(write(tmp_path / layout, ROWS)))))
        for kind, (corrupt, layouts, allowed) in KINDS.items():
            for seed in range(SEEDS if layout in layouts else 0):
                folder = tmp_path / f"{layout} {kind.replace(': ', ' ')} {seed}"
                touched = corrupt(layout, folder, random.Random(f"{layout} {kind} {seed}"))
                found = outcome(layout, folder, pristine, touched)
                assert found in allowed, (layout, kind, seed, found)
                counts[kind, found] += 1
    assert counts.total() >= 300
    for kind, (_, _, allowed) in KINDS.items():
        assert any(counts[kind, found] for found in allowed - {SAME}), kind
    assert {found for _, found in counts} == {DROPPED, CHANGED, STOPPED, SAME}
