import os

import pytest
from etils.epath.testing import mock_epath
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import LocalEntryNotFoundError
from preference_sets import (
    examples,
    read_all,
    tar_of,
    write_hpdv2,
    write_hpdv3,
    write_pair_folder,
    write_pick_a_pic,
    write_tars,
)

from flax_pref.data import sources
from flax_pref.data.sources import Source, open_source

WRITERS = {
    "pick_a_pic": write_pick_a_pic,
    "hpdv2": write_hpdv2,
    "hpdv3": write_hpdv3,
    "folder": write_pair_folder,
    "webdataset": write_tars,
}
HUB_ID = "owner/pickapic_v2"


def records(source):
    return {row: record[1:4] for row, record in read_all(open_source(source))[1].items()}


def expected(rows):
    return {number: row[:3] for number, row in enumerate(rows)}


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(sources, "snapshot_download", refuse)
    monkeypatch.setattr(sources, "HfFileSystem", refuse)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub whose files are in a folder; nothing is in its cache."""

    def not_cached(name, *, repo_type, local_files_only):
        assert (name, repo_type, local_files_only) == (HUB_ID, "dataset", True)
        raise LocalEntryNotFoundError("not in the cache")

    folder = tmp_path / "hub"
    (folder / "datasets").mkdir(parents=True)
    monkeypatch.setattr(sources, "snapshot_download", not_cached)
    monkeypatch.setattr(sources, "HfFileSystem", lambda: DirFileSystem(str(folder), LocalFileSystem()))
    return folder / "datasets" / HUB_ID


@pytest.mark.parametrize("layout", WRITERS)
def test_a_set_gives_the_same_records_in_every_layout(tmp_path, no_hub, layout):
    rows = examples(6)
    assert records(Source(layout=layout, path=str(WRITERS[layout](tmp_path / "set", rows)))) == expected(rows)
    reader = open_source(Source(layout=layout, path=str(tmp_path / "set")))
    assert [read_all(reader)[1][row].row for row in range(6)] == list(range(6))


@pytest.mark.parametrize("layout", WRITERS)
def test_a_set_in_a_bucket_is_read_where_it_is(tmp_path, no_hub, layout):
    rows = examples(4)
    WRITERS[layout](tmp_path / "set", rows)

    def local(original, path, *arguments):
        return original(os.fspath(path).replace("gs://bucket", str(tmp_path)), *arguments)

    def glob(original, path):
        return [found.replace(str(tmp_path), "gs://bucket") for found in local(original, path)]

    with mock_epath(open=local, exists=local, isdir=local, glob=glob):
        source = Source(layout=layout, path="gs://bucket/set")
        assert records(source) == expected(rows)
        assert open_source(source).where(0)[0].startswith("gs://bucket/set/")


def test_a_split_is_chosen_by_the_names_of_the_files(tmp_path, no_hub):
    rows = examples(9)
    for split, some in (("train", rows[:4]), ("validation", rows[4:6]), ("validation_unique", rows[6:])):
        folder = write_pick_a_pic(tmp_path, some, split=split)
    for path in (folder, folder / "data"):
        assert records(Source(layout="pick_a_pic", path=str(path))) == expected(rows[:4])
        assert records(Source(layout="pick_a_pic", path=str(path), split="validation")) == expected(rows[4:6])
        with pytest.raises(
            FileNotFoundError, match="no files of the split 'test'; there are train, validation, validation_unique"
        ):
            open_source(Source(layout="pick_a_pic", path=str(path), split="test"))


def test_files_without_a_split_in_their_names_and_a_single_file_are_the_whole_set(tmp_path, no_hub):
    rows = examples(4)
    folder = write_pick_a_pic(tmp_path, rows) / "data"
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"part-{number}.parquet")
    assert records(Source(layout="pick_a_pic", path=str(tmp_path), split="any")) == expected(rows)
    assert records(Source(layout="pick_a_pic", path=str(folder / "part-0.parquet"))) == expected(rows[:2])


def test_the_json_list_of_a_split_is_found_in_its_folder(tmp_path, no_hub):
    rows = examples(2)
    file = write_hpdv3(tmp_path, rows)
    assert records(Source(layout="hpdv3", path=str(tmp_path))) == expected(rows)
    file.rename(tmp_path / "test.json")
    assert records(Source(layout="hpdv3", path=str(tmp_path), split="test")) == expected(rows)
    with pytest.raises(
        FileNotFoundError, match=r"train\.json: no such file; expected the .*, and there are test\.json"
    ):
        open_source(Source(layout="hpdv3", path=str(tmp_path)))


def test_one_tar_and_pairs_jsonl_can_be_named_themselves(tmp_path, no_hub):
    rows = examples(4)
    folder = write_tars(tmp_path / "tars", rows)
    assert records(Source(layout="webdataset", path=str(folder / "00000.tar"))) == expected(rows[:2])
    file = write_pair_folder(tmp_path / "pairs", rows) / "pairs.jsonl"
    assert records(Source(layout="folder", path=str(file))) == expected(rows)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("pick_a_pic", r"set: no \*\.parquet in it or in its folder data"),
        ("hpdv2", r"train\.json: no such file; .* there are none"),
        ("hpdv3", r"train\.json: no such file; .* there are none"),
        ("folder", r"pairs\.jsonl: no such file"),
        ("webdataset", r"set: no such file, or no \*\.tar in this folder"),
    ],
)
def test_a_folder_without_the_set_and_a_path_that_is_not_there_are_named(tmp_path, no_hub, layout, message):
    (tmp_path / "set").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        open_source(Source(layout=layout, path=str(tmp_path / "set")))
    with pytest.raises(FileNotFoundError, match=r"none.* no such file"):
        open_source(Source(layout=layout, path=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("pick_a_pic", "a.parquet"),
        ("hpdv2", "train.json"),
        ("hpdv3", "train.json"),
        ("folder", "pairs.jsonl"),
        ("webdataset", "a.tar"),
    ],
)
def test_a_fifo_or_a_folder_in_the_place_of_a_file_is_named_and_not_waited_for(tmp_path, layout, name):
    for make in (os.mkfifo, os.mkdir):
        (tmp_path / make.__name__).mkdir()
        make(tmp_path / make.__name__ / name)
        with pytest.raises(ValueError, match=rf"{name}: is no regular file but a folder, FIFO or device; remove it"):
            open_source(Source(layout=layout, path=str(tmp_path / make.__name__)))


def test_compressed_tars_of_a_folder_are_told_from_none(tmp_path, no_hub):
    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + tar_of([]))
    with pytest.raises(ValueError, match=r"a\.tar\.zst: compressed with zstd"):
        open_source(Source(layout="webdataset", path=str(tmp_path)))


def test_an_id_is_read_from_the_hub_without_downloading(hub):
    rows = examples(5)
    write_pick_a_pic(hub, rows[:4])
    write_pick_a_pic(hub, rows[4:], split="test", files=1)
    reader = open_source(Source(layout="pick_a_pic", path=HUB_ID))
    assert {row: record[1:4] for row, record in read_all(reader)[1].items()} == expected(rows[:4])
    assert reader.where(3) == (f"hf://datasets/{HUB_ID}/data/train-00001-of-00002-0123456789abcdef.parquet", 1)
    with pytest.raises(FileNotFoundError, match=f"{HUB_ID}: no files of the split 'dev'; there are test, train"):
        open_source(Source(layout="pick_a_pic", path=HUB_ID, split="dev"))
    file = next((hub / "data").glob("test-*"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"hf://datasets/.*test-00000.*: cannot be read as parquet"):
        open_source(Source(layout="pick_a_pic", path=HUB_ID, split="test"))


def test_what_is_in_the_cache_of_the_hub_is_not_read_from_it_unless_files_are_missing(hub, monkeypatch, tmp_path):
    rows = examples(6)
    cached = write_pick_a_pic(tmp_path / "cached", rows[:4])
    write_pick_a_pic(hub, rows[2:], files=2)
    monkeypatch.setattr(sources, "snapshot_download", lambda *arguments, **options: str(cached))
    assert records(Source(layout="pick_a_pic", path=HUB_ID)) == expected(rows[:4])
    next((cached / "data").iterdir()).unlink()
    assert records(Source(layout="pick_a_pic", path=HUB_ID)) == expected(rows[2:])


def test_an_id_that_is_neither_here_nor_within_reach_says_what_to_do(hub, monkeypatch):
    source = Source(layout="pick_a_pic", path=HUB_ID)
    with pytest.raises(FileNotFoundError, match=f"{HUB_ID}: no such file or folder, and on the Hub no such dataset"):
        open_source(source)

    class Offline:
        def glob(self, pattern):
            raise ConnectionError("no route to host")

    monkeypatch.setattr(sources, "HfFileSystem", Offline)
    with pytest.raises(FileNotFoundError, match=r"the Hub cannot be reached \(ConnectionError\).* download .* folder"):
        open_source(source)


def test_no_connection_ends_in_one_line_with_the_hubs_own_library(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "HfFileSystem", lambda: HfFileSystem(endpoint="http://127.0.0.1:9"))
    with pytest.raises(FileNotFoundError, match="the Hub cannot be reached") as caught:
        open_source(Source(layout="pick_a_pic", path=HUB_ID))
    assert "\n" not in str(caught.value)
