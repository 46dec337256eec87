import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flax_pref.data.pick_a_pic import LabelledPair, PairReader, decode_image, encode_image, write_pairs


def labelled(i, label):
    return LabelledPair(f"prompt {i}", b"zero", b"one", label, f"{i}-0", f"{i}-1", "base", "base")


@pytest.fixture
def file(tmp_path):
    write_pairs(tmp_path / "a.parquet", [labelled(0, 1.0), labelled(1, 0.0), labelled(2, 0.5)], rows_per_group=2)
    return tmp_path / "a.parquet"


def test_winners_and_losers_come_back_and_ties_are_counted(file):
    reader = PairReader(file)
    first, second = reader
    assert (first.caption, first.winner, first.loser) == ("prompt 0", b"zero", b"one")
    assert (second.caption, second.winner, second.loser) == ("prompt 1", b"one", b"zero")
    assert (second.winner_uid, second.loser_uid) == ("1-1", "1-0")
    assert reader.counts == {"pairs": 2, "ties": 1}


def test_the_file_has_the_columns_of_pick_a_pic_v2(file):
    table = pq.read_table(file)
    published = {
        *("are_different", "best_image_uid", "caption", "created_at", "has_label", "image_0_uid", "image_0_url"),
        *("image_1_uid", "image_1_url", "jpg_0", "jpg_1", "label_0", "label_1", "model_0", "model_1", "ranking_id"),
        *("user_id", "num_example_per_prompt", "__index_level_0__"),
    }
    assert set(table.column_names) == published
    assert table["best_image_uid"].to_pylist() == ["0-0", "1-1", "tie"]
    assert table["label_1"].to_pylist() == [0.0, 1.0, 0.5]


def test_a_folder_is_read_in_the_order_of_its_files(file):
    write_pairs(file.with_name("b.parquet"), [labelled(3, 1.0)])
    assert [pair.caption for pair in PairReader(file.parent)] == ["prompt 0", "prompt 1", "prompt 3"]


def rewrite(file, **columns):
    table = pq.read_table(file)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, file)


def test_rows_without_a_preference_are_left_out_and_counted(file):
    rewrite(file, has_label=[False, True, True], are_different=[True, False, True])
    reader = PairReader(file)
    assert list(reader) == []
    assert reader.counts == {"unlabelled": 1, "identical": 1, "ties": 1}


def test_labels_that_mean_nothing_are_named_with_their_row(file):
    rewrite(file, label_0=[1.0, 1.0, 1.0], label_1=[0.0, 1.0, 0.0])
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: labels \(1\.0, 1\.0\); expected"):
        list(PairReader(file))


def test_a_missing_column_a_wrong_file_and_an_empty_folder_are_named(file, tmp_path):
    pq.write_table(pq.read_table(file).drop_columns(["jpg_1"]), file)
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'jpg_1'"):
        list(PairReader(file))
    file.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: not a parquet file"):
        list(PairReader(file))
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "none.parquet"):
        with pytest.raises(FileNotFoundError, match="no parquet file"):
            PairReader(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(file, tmp_path):
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"pair 1: label_0=0\.7"):
        write_pairs(file, [labelled(0, 1.0), dataclasses.replace(labelled(1, 1.0), label_0=0.7)])
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_images_survive_as_jpeg():
    y, x = np.mgrid[:64, :64] / 63
    image = np.stack([x, y, 1 - x], -1).astype(np.float32)
    decoded = decode_image(encode_image(image))
    assert decoded.shape == (64, 64, 3) and decoded.dtype == np.float32
    assert np.abs(decoded - image).max() < 0.05


def test_bytes_that_are_no_image_are_named():
    with pytest.raises(ValueError, match="winner 7: not a complete image"):
        decode_image(b"\xff\xd8 broken", "winner 7")
    with pytest.raises(ValueError, match="not a complete image"):
        decode_image(encode_image(np.random.default_rng(0).random((64, 64, 3)))[:500])
