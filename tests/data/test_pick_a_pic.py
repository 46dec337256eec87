import dataclasses
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from preference_sets import Example, examples, read_all, write_pick_a_pic

from flax_pref.data.pairs import Drop, Judgement, Tie
from flax_pref.data.pick_a_pic import READ, LabelledPair, PickAPic, write_pairs

# What https://huggingface.co/datasets/yuvalkirstain/pickapic_v2 tells of its files; those of v1 are the same.
PUBLISHED = {
    **dict.fromkeys(("are_different", "has_label"), pa.bool_()),
    **dict.fromkeys(("best_image_uid", "caption", "image_0_uid", "image_0_url", "image_1_uid"), pa.string()),
    **dict.fromkeys(("image_1_url", "model_0", "model_1"), pa.string()),
    **dict.fromkeys(("jpg_0", "jpg_1"), pa.binary()),
    **dict.fromkeys(("label_0", "label_1"), pa.float64()),
    **dict.fromkeys(("ranking_id", "user_id", "num_example_per_prompt", "__index_level_0__"), pa.int64()),
    "created_at": pa.timestamp("ns"),
}


def labelled(i, label):
    return LabelledPair(f"prompt {i}", b"zero", b"one", label, f"{i}-0", f"{i}-1", "base", "base")


@pytest.fixture
def file(tmp_path):
    write_pairs(tmp_path / "a.parquet", [labelled(0, 1.0), labelled(1, 0.0), labelled(2, 0.5)], rows_per_group=2)
    return tmp_path / "a.parquet"


def opened(*files):
    return PickAPic([epath.Path(file) for file in files])


def rewrite(file, rows_per_group=2, **columns):
    table = pq.read_table(file)
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, values if isinstance(values, pa.Array) else pa.array(values))
    pq.write_table(table, file, row_group_size=rows_per_group)


def test_winners_losers_and_ties_come_back_with_their_rows(file):
    said, records = read_all(opened(file))
    assert said[0] == Judgement("prompt 0", 0, ("0-0", "0-1"), models=("base", "base"))
    assert said[1] == Judgement("prompt 1", 1, ("1-0", "1-1"), models=("base", "base"))
    assert said[2] == Tie()
    assert (records[0].winner, records[0].loser, records[0].winner_first) == (b"zero", b"one", True)
    assert (records[1].winner, records[1].loser, records[1].winner_first) == (b"one", b"zero", False)
    assert (records[1].winner_id, records[1].loser_id, records[1].row) == ("1-1", "1-0", 1)
    assert len(records) == 2


def test_the_file_has_the_columns_of_pick_a_pic_v2(file):
    table = pq.read_table(file)
    assert {field.name: field.type for field in table.schema} == PUBLISHED
    assert table["best_image_uid"].to_pylist() == ["0-0", "1-1", "tie"]
    assert table["label_1"].to_pylist() == [0.0, 1.0, 0.5]


def test_rows_keep_their_numbers_over_files_and_row_groups(tmp_path):
    rows = examples(7, ties=[2])
    folder = write_pick_a_pic(tmp_path, rows, files=3) / "data"
    write_pairs(folder / "between.parquet", [])
    files = sorted(folder.glob("train-*"))
    reader = opened(files[0], folder / "between.parquet", *files[1:])
    said, records = read_all(reader)
    assert len(reader) == 7 and reader.where(6) == (str(files[2]), 0) and reader.where(2) == (str(files[0]), 2)
    assert {row: (record.caption, record.winner, record.loser) for row, record in records.items()} == {
        row: example[:3] for row, example in enumerate(rows) if not example.tie
    }
    for start in range(7):
        for end in range(start, 8):
            assert list(reader.judgements(range(start, end))) == said[start:end]
    for wanted in ([0], [6], [1, 3], [0, 5, 6], np.array([1, 4]), list(range(7)), []):
        assert list(reader.images(wanted)) == [rows[row].images for row in wanted]


def test_the_layout_that_other_tools_write_is_read_too(file):
    table = pq.read_table(file).select(READ)  # v1 without the models; large strings, as polars writes them
    casts = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary(), pa.float64(): pa.float32()}
    schema = pa.schema([(field.name, casts.get(field.type, field.type)) for field in table.schema])
    pq.write_table(table.cast(schema), file)
    said, records = read_all(opened(file))
    assert said[0] == Judgement("prompt 0", 0, ("0-0", "0-1")) and said[2] == Tie()
    assert records[1].winner == b"one"


@pytest.mark.parametrize(
    ("columns", "drop"),
    [
        ({"label_0": 1.0, "label_1": 1.0}, Drop("labels mean nothing", "[1.0, 1.0]; expected 1 and 0, or 0.5 twice")),
        ({"label_0": 0.0, "label_1": 0.0}, Drop("labels mean nothing", "[0.0, 0.0]")),
        ({"label_0": 0.7, "label_1": 0.3}, Drop("labels mean nothing", "[0.7, 0.3]")),
        ({"label_0": -1.0}, Drop("labels mean nothing", "[-1.0, 1.0]")),
        ({"label_0": float("nan")}, Drop("labels mean nothing", "[NaN, 1.0]")),
        ({"label_1": None}, Drop("labels mean nothing", "[0.0, null]")),
        ({"has_label": False}, Drop("no label", damaged=False)),
        ({"are_different": False}, Drop("both images are the same", damaged=False)),
        ({"image_1_uid": None}, Drop("id is missing", "image_1_uid")),
        ({"image_0_uid": ""}, Drop("id is missing", "image_0_uid")),
        ({"caption": None}, Drop("caption is empty", "null")),
        ({"caption": " \n"}, Drop("caption is empty", '" \\n"')),
        ({"caption": "x" * 10_000}, Drop("caption is too long", "10000 characters; at most 5000")),
    ],
)
def test_a_damaged_row_is_left_out_with_the_reason_and_the_others_stay(file, columns, drop):
    table = pq.read_table(file)
    rewrite(file, **{name: [*table[name].to_pylist()[:1], value, None] for name, value in columns.items()})
    said, records = read_all(opened(file))
    assert said[0].caption == "prompt 0" and said[1].reason == drop.reason, said
    assert said[1].detail.startswith(drop.detail) and said[1].damaged == drop.damaged
    assert list(records) == [0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1, 0, None], ["label", "no label", "label"]),
        ([1.0, 0.0, 2.0], ["label", "no label", "labels mean nothing"]),
        (["true", "False", "yes"], ["label", "no label", "labels mean nothing"]),
        (["1", "0", ""], ["label", "no label", "labels mean nothing"]),
    ],
)
def test_truth_values_in_numbers_and_texts_are_read_as_what_they_say(file, values, said):
    for name, reason in (("has_label", "no label"), ("are_different", "both images are the same")):
        write_pairs(file, [labelled(0, 1.0), labelled(1, 0.0), labelled(2, 1.0)])
        rewrite(file, **{name: values})
        found, _ = read_all(opened(file))
        assert [what.reason if isinstance(what, Drop) else "label" for what in found] == [
            reason if what == "no label" else what for what in said
        ]
        assert all(what.detail == "" or name in what.detail for what in found if isinstance(what, Drop))


def test_columns_of_other_types_are_named(file):
    table = pq.read_table(file)
    others = {"label_0": ["1", "0", "1"], "caption": [1, 2, 3], "has_label": [[True]] * 3, "image_0_uid": [0.5] * 3}
    others |= {"model_0": [b"base"] * 3, "are_different": [b"true"] * 3, "label_1": [True, False, True]}
    for name, values in others.items():
        pq.write_table(table.set_column(table.column_names.index(name), name, [values]), file)
        with pytest.raises(
            ValueError, match=rf"a\.parquet: column '{name}' is of type .*; expected (truth|texts|numbers)"
        ):
            opened(file)
    category = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(table.set_column(table.column_names.index("caption"), "caption", category), file)
    assert read_all(opened(file))[0][0].caption == "a"


def test_pages_are_written_with_checksums_and_a_changed_byte_in_any_page_is_found(tmp_path):
    """Uncompressed and without checksums, such bytes would be other captions, ids, labels and images."""
    rows = examples(4)
    file = next((write_pick_a_pic(tmp_path, rows, files=1) / "data").iterdir())
    pq.write_table(
        pq.read_table(file), tmp_path / "a.parquet", compression="none", use_dictionary=False, write_page_checksum=True
    )
    for whole, path in ((file.read_bytes(), file), ((tmp_path / "a.parquet").read_bytes(), tmp_path / "a.parquet")):
        footer = pq.read_metadata(pa.BufferReader(whole))
        for name in (*READ, "model_0"):
            column = footer.row_group(0).column(footer.schema.to_arrow_schema().names.index(name))
            data = bytearray(whole)
            start = column.dictionary_page_offset or column.data_page_offset
            data[start + column.total_compressed_size - 1] ^= 1
            path.write_bytes(data)
            with pytest.raises(ValueError, match=rf"{path.name}: cannot be read as parquet .*(CRC|crc|checksum)"):
                read_all(opened(path))
        path.write_bytes(whole)


def test_an_image_that_is_null_is_left_out_with_its_column(file):
    rewrite(file, jpg_1=pa.array([b"one", None, b"one"], pa.binary()))
    said, records = read_all(opened(file))
    assert isinstance(said[1], Judgement)
    assert records[1] == Drop("image is missing", "jpg_1") and records[0].winner == b"zero"


def test_a_missing_column_and_the_copy_without_images_are_named(file):
    table = pq.read_table(file)
    for name in READ:
        pq.write_table(table.drop_columns([name]), file)
        with pytest.raises(ValueError, match=rf"a\.parquet: no column '{name}'") as caught:
            opened(file)
        assert ("pickapic_v2_no_images" in str(caught.value)) == name.startswith("jpg")
    pq.write_table(table.drop_columns(["jpg_0", "jpg_1"]), file)
    with pytest.raises(ValueError, match=r"no column 'jpg_0': this is the copy without images .*; get the one with"):
        opened(file)
    pq.write_table(table.set_column(table.column_names.index("jpg_0"), "jpg_0", [["a", "b", "c"]]), file)
    with pytest.raises(ValueError, match=r"a\.parquet: column 'jpg_0' is of type string; expected binary"):
        opened(file)


def test_damaged_files_are_named_when_they_are_opened_or_where_they_are_read(tmp_path):
    rows = examples(4)
    file = next((write_pick_a_pic(tmp_path, rows, files=1) / "data").iterdir())
    whole = file.read_bytes()
    for data in (b"", b"no parquet", whole[: len(whole) // 2], whole[:-1], whole[len(whole) // 2 :]):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{file.name}: cannot be read as parquet .*; if damaged") as caught:
            read_all(opened(file))
        assert "\n" not in str(caught.value)
    footer = pq.read_metadata(pa.BufferReader(whole))
    for name, read in (("caption", lambda reader: reader.judgements(range(4))), ("jpg_1", lambda r: r.images([2, 3]))):
        column = footer.row_group(1).column(footer.schema.to_arrow_schema().names.index(name))
        start = column.dictionary_page_offset or column.data_page_offset
        data = bytearray(whole)
        data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
        file.write_bytes(data)
        reader = opened(file)
        with pytest.raises(ValueError, match=rf"{file.name}: cannot be read as parquet"):
            list(read(reader))
        assert list(reader.images([0])) == [rows[0].images]


def test_judgements_never_read_images_and_images_only_the_row_groups_asked_for(tmp_path):
    rows = examples(6)
    file = next((write_pick_a_pic(tmp_path, rows, files=1) / "data").iterdir())
    footer, data = pq.read_metadata(file), bytearray(file.read_bytes())
    for group in (0, 2):
        for name in ("jpg_0", "jpg_1"):
            column = footer.row_group(group).column(footer.schema.to_arrow_schema().names.index(name))
            start = column.dictionary_page_offset or column.data_page_offset
            data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    file.write_bytes(data)
    reader = opened(file)
    assert [said.caption for said in reader.judgements(range(6))] == [row.caption for row in rows]
    assert list(reader.images([2, 3])) == [rows[2].images, rows[3].images]


def test_memory_holds_a_few_rows_of_a_large_row_group_not_all(tmp_path):
    file, count, size = tmp_path / "a.parquet", 96, 500_000
    image = [np.random.default_rng(i).bytes(size) for i in range(count)]
    write_pairs(file, (dataclasses.replace(labelled(i, 1.0), jpg_0=image[i], jpg_1=b"%d" % i) for i in range(count)))
    assert pq.read_metadata(file).num_row_groups == 1
    reader, before = opened(file), pa.total_allocated_bytes()
    tracemalloc.start()
    peak = 0
    for row, images in enumerate(reader.images(range(count))):
        assert images == (image[row], b"%d" % row)
        peak = max(peak, pa.total_allocated_bytes() - before)
    python_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert python_peak < 15 * size and peak < 40 * size, (python_peak / size, peak / size)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(file, tmp_path):
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"pair 1: label_0=0\.7"):
        write_pairs(file, [labelled(0, 1.0), dataclasses.replace(labelled(1, 1.0), label_0=0.7)])
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_an_image_that_wins_one_pair_and_loses_another_keeps_its_bytes(tmp_path):
    shared = b"the same image"
    rows = [Example("a", shared, b"x"), Example("b", b"y", shared, winner_first=False)]
    _, records = read_all(opened(*(write_pick_a_pic(tmp_path, rows, files=1) / "data").iterdir()))
    assert records[0].winner == records[1].loser == shared
