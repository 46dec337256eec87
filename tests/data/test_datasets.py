"""Sets that `datasets` loads: whatever they are stored in, the rows are the same and each is accounted for."""

import dataclasses
import hashlib
import itertools
import json
import os
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import datasets
import local_hub
import pyarrow.parquet as pq
import pytest
from preference_sets import encoded_image, examples, read_all, tar_of, write_hpdv3, write_pick_a_pic
from stored_datasets import (
    SCORES,
    STORED,
    as_struct,
    offline,
    record,
    stored,
    table,
    write_image_reward_db,
    write_image_reward_groups,
    write_image_reward_pairs,
    write_images,
    write_open_image_preferences,
    write_parquet,
)

from flax_pref.config import load_config
from flax_pref.data.columns import Columns
from flax_pref.data.encode import Encoding, PairEncoder
from flax_pref.data.pairs import Drop, Judgement, Tie, pairs
from flax_pref.data.preparation import EncodeConfig
from flax_pref.data.selection import Choice, select
from flax_pref.data.sources import Source, open_source

ROOT = Path(__file__).parents[2]
ROLES = Columns(caption="prompt", winner="winner", loser="loser")
LABEL = Columns(
    caption="prompt", images=("image_0", "image_1"), label="better", first=("0",), second=("1",), ties=("tie",)
)
LISTS = Columns(caption="prompt", images=("images",), scores=("ranks",), lower_wins=True)
GROUPS = Columns(caption="prompt", images=("image",), scores=("rank",), lower_wins=True, group="prompt_id")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    offline(tmp_path / "cache", monkeypatch)


def expected(rows):
    return {number: row[:3] for number, row in enumerate(rows) if not row.tie}


def records(reader):
    return {row: pair[1:4] for row, pair in read_all(reader)[1].items()}


# ----------------------------------------------------------------------------------------------------------------------
# Every way to store a set and to name its columns


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", STORED)
def test_a_set_gives_the_same_records_however_it_is_stored(tmp_path, how, stream):
    rows = examples(6, ties=[2])
    source = stored(tmp_path / "set", rows, how, stream=stream)
    reader = open_source(source)
    said, found = read_all(reader)
    assert {row: pair[1:4] for row, pair in found.items()} == expected(rows)
    assert said[2] == Tie() and len(reader) == 6
    assert [found[row].winner_first for row in found] == [row.winner_first for row in rows if not row.tie]
    assert said[0].margin == 1 and found[0].names == ("winner, column image_0", "loser, column image_1")
    for start, end in itertools.combinations(range(7), 2):
        assert list(reader.judgements(range(start, end))) == said[start:end]
    for some in ([5], [0], [1, 3], [0, 4, 5], [3, 4], []):
        assert list(reader.images(some)) == [rows[row].images for row in some]
    assert reader.where(4)[0].startswith(str(tmp_path)) and all(os.path.exists(str(f)) for f in reader.image_files([4]))
    assert reader.image_files([]) == []


@pytest.mark.parametrize("how", STORED)
def test_winner_and_loser_labels_and_scores_say_the_same(tmp_path, how):
    rows = examples(4, ties=[1])
    source = stored(tmp_path / "set", rows, how)
    for columns in (LABEL, SCORES):
        assert records(open_source(dataclasses.replace(source, columns=columns))) == expected(rows)
    reader = open_source(dataclasses.replace(source, columns=ROLES))
    assert reader.winner_listed_first and records(reader) == expected([row._replace(tie=False) for row in rows])


def test_labels_are_texts_numbers_truth_values_or_names_of_classes(tmp_path):
    rows = examples(4)
    for number, (values, first, second) in enumerate(
        [
            ([1, 2, 1, 2], "1", "2"),
            ([1.0, 0.0, 1.0, 0.0], "1", "0"),
            ([True, False, True, False], "true", "false"),
            ([" a", "b ", "a", "b"], "a", "b"),
            ([0, 1, 0, 1], "left", "right"),
        ]
    ):
        written = table(rows).add_column("choice", values)
        if first == "left":
            written = written.cast_column("choice", datasets.ClassLabel(names=["left", "right"]))
        written.to_parquet(tmp_path / f"{number}" / "train.parquet")
        columns = dataclasses.replace(LABEL, label="choice", first=(first,), second=(second,), ties=())
        source = Source(layout="datasets", path=str(tmp_path / f"{number}"), columns=columns)
        assert records(open_source(source)) == expected(rows)
        said = list(open_source(dataclasses.replace(source, columns=SWAPPED(columns))).judgements(range(4)))
        assert [what.winner for what in said] == [1, 0, 1, 0]
        unknown = dataclasses.replace(source, columns=dataclasses.replace(columns, first=("x",)))
        said = list(open_source(unknown).judgements(range(4)))
        assert [isinstance(what, Drop) for what in said] == [True, False, True, False]
        assert said[0] == Drop("labels mean nothing", f'choice: "{first}"; expected one of x, {second}')


def SWAPPED(columns):
    return dataclasses.replace(columns, first=columns.second, second=columns.first)


def test_ids_models_confidence_margin_and_required_columns_are_read(tmp_path):
    rows = examples(4)
    written = table(rows)
    more = {"id_0": [7, 8, 9, 10], "id_1": ["a", "b", "c", ""], "model_0": ["x"] * 4, "model_1": ["y"] * 4}
    more |= {"sure": [0.5, None, 1.0, 0.2], "by": [2.0, 3.0, None, 1.0], "good": [True, True, False, None]}
    for name, values in more.items():
        written = written.add_column(name, values)
    written.save_to_disk(tmp_path / "set")
    columns = dataclasses.replace(
        SCORES, ids=("id_0", "id_1"), models=("model_0", "model_1"), confidence="sure", margin="by", required=("good",)
    )
    said = list(
        open_source(Source(layout="datasets", path=str(tmp_path / "set"), columns=columns)).judgements(range(4))
    )
    assert said == [
        Judgement("caption 0", 0, ("7", "a"), 0.5, 2.0, ("x", "y")),
        Judgement("caption 1", 1, ("8", "b"), None, 3.0, ("x", "y")),
        Drop("good is false", damaged=False),
        Drop("id is missing", "id_1"),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_columns_within_others_are_named_with_a_dot_as_in_tars(tmp_path, stream):
    rows, members = examples(4, ties=[1]), []
    for i, row in enumerate(rows):
        members += [(f"{i:03}.{place}.jpg", data) for place, data in enumerate(row.images)]
        said = {"prompt": row.caption, "labels": dict(zip("ab", row.labels, strict=True)), "prompt.id": 7}
        members += [(f"{i:03}.json", json.dumps(said).encode())]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.tar").write_bytes(tar_of(members))
    columns = Columns(caption="json.prompt", images=("0.jpg", "1.jpg"), scores=("json.labels.a", "json.labels.b"))
    source = Source(layout="datasets", path=str(tmp_path / "set"), columns=columns, stream=stream)
    reader = open_source(source)
    assert records(reader) == expected(rows) and list(reader.judgements(range(1, 2))) == [Tie()]
    with pytest.raises(ValueError, match=r"no column 'json\.text' for columns\.caption; there are .*'json'"):
        open_source(dataclasses.replace(source, columns=dataclasses.replace(columns, caption="json.text")))


# ----------------------------------------------------------------------------------------------------------------------
# Ranks of several images


RANKED = [  # prompt, ranks of its images
    ("a", [2, 1, 3]),
    ("b", [1, 1]),
    ("c", [1]),
    ("d", [3, 2, 1, 1]),
]


def ranked_images():
    numbers = itertools.count()
    return [[encoded_image(next(numbers)) for _ in ranks] for _, ranks in RANKED]


def expected_of_ranks(ids):
    """Every two images of each prompt, in order."""
    found, images = [], ranked_images()
    for (prompt, ranks), its_images, its_ids in zip(RANKED, images, ids, strict=True):
        if len(ranks) < 2:
            found.append("alone")
        for i, j in itertools.combinations(range(len(ranks)), 2):
            if ranks[i] == ranks[j]:
                found.append(Tie())
                continue
            winner = 0 if ranks[i] < ranks[j] else 1
            said = Judgement(prompt, winner, (its_ids[i], its_ids[j]), margin=abs(ranks[i] - ranks[j]))
            found.append((said, (its_images[i], its_images[j])))
    return found


def check_ranks(reader, ids):
    wanted = expected_of_ranks(ids)
    said = list(reader.judgements(range(len(reader))))
    assert len(said) == len(wanted)
    rows = []
    for row, (what, right) in enumerate(zip(said, wanted, strict=True)):
        if right == "alone":
            assert what.reason == "only one image of its prompt" and not what.damaged
        else:
            assert what == (right if isinstance(right, Tie) else right[0])
            rows += [] if isinstance(right, Tie) else [row]
    assert list(reader.images(rows)) == [wanted[row][1] for row in rows]
    for row in rows:
        assert list(reader.images([row])) == [wanted[row][1]] and list(reader.judgements(range(row, row + 1)))
        assert reader.image_files([row])
    assert len([pair for pair in pairs(reader, rows) if not isinstance(pair, Drop)]) == len(rows)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_every_two_images_of_a_list_are_a_row(tmp_path, suffix, stream):
    images = ranked_images()
    written = datasets.Dataset.from_list(
        [
            {"prompt": prompt, "ranks": ranks, "images": list(map(as_struct, some))}
            for (prompt, ranks), some in zip(RANKED, images, strict=True)
        ]
    ).cast_column("images", datasets.List(datasets.Image()))
    if suffix == "parquet":
        written.to_parquet(tmp_path / "set" / "train.parquet", batch_size=2)
    else:
        written.save_to_disk(tmp_path / "saved")
        (tmp_path / "set").mkdir()
        next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / "set" / "train.arrow")
    reader = open_source(Source(layout="datasets", path=str(tmp_path / "set"), columns=LISTS, stream=stream))
    check_ranks(reader, [[f"{row}-{place}" for place in range(len(ranks))] for row, (_, ranks) in enumerate(RANKED)])
    assert [reader.where(row)[1] for row in (0, 2, 3, 4, 5, 10)] == [0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("order", ["together", "apart"])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_every_two_rows_of_a_group_are_a_row(tmp_path, suffix, order, stream):
    rows = [
        {"prompt": prompt, "prompt_id": f"{prompt}!", "rank": rank, "image": data, "number": f"{prompt}{place}"}
        for (prompt, ranks), images in zip(RANKED, ranked_images(), strict=True)
        for place, (rank, data) in enumerate(zip(ranks, images, strict=True))
    ]
    if order == "apart":  # the first images of all groups, then the second ones
        rows.sort(key=lambda row: row["number"][1:])
    ids = {}
    (tmp_path / "set").mkdir()
    for place, row in enumerate(rows):
        ids.setdefault(row["prompt"], []).append(str(place))
        if suffix == "jsonl":
            (tmp_path / "set" / f"{place}.jpg").write_bytes(row["image"])
            row["image"] = f"{place}.jpg"
    if suffix == "jsonl":
        ids = {prompt: [f"{place}.jpg" for place in places] for prompt, places in ids.items()}
        (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet", batch_size=3)
    files = ("train.jsonl",) if suffix == "jsonl" else ()
    source = Source(layout="datasets", path=str(tmp_path / "set"), columns=GROUPS, stream=stream, files=files)
    check_ranks(open_source(source), list(ids.values()))


def test_ids_and_models_of_lists_and_groups_are_those_of_their_images(tmp_path):
    image, names = as_struct(encoded_image(0)), ["x", "y", "z"]
    one = {"prompt": "a", "ranks": [1, 2, 3], "images": [image] * 3, "ids": names, "models": ["m", "n", "m"]}
    datasets.Dataset.from_list([one, one | {"ids": ["x", "y"]}]).save_to_disk(tmp_path / "lists")
    columns = dataclasses.replace(LISTS, ids=("ids",), models=("models",))
    source = Source(layout="datasets", path=str(tmp_path / "lists"), columns=columns)
    said = list(open_source(source).judgements(range(6)))
    expected = [
        Judgement("a", 0, (names[i], names[j]), margin=j - i, models=("mnm"[i], "mnm"[j]))
        for i, j in itertools.combinations(range(3), 2)
    ]
    assert said == [*expected, *[Drop("ids are not as many as ranks", "2 and 3")] * 3]
    rows = [
        {"prompt": "a", "prompt_id": 1, "rank": i, "image": image, "id": name, "model": "mnm"[i]}
        for i, name in enumerate(names)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "groups")
    columns = dataclasses.replace(GROUPS, ids=("id",), models=("model",))
    source = Source(layout="datasets", path=str(tmp_path / "groups"), columns=columns)
    assert list(open_source(source).judgements(range(3))) == expected


def test_lists_and_groups_that_make_no_pair_are_rows_with_a_reason(tmp_path):
    image = as_struct(encoded_image(0))
    rows = [
        {"prompt": "a", "ranks": [1, 2], "images": [image]},
        {"prompt": "b", "ranks": None, "images": [image]},
        {"prompt": "c", "ranks": [], "images": []},
        {"prompt": "d", "ranks": [1, None], "images": [image, None]},
        {"prompt": "e", "ranks": [1, 2], "images": [image, None]},
        {"prompt": None, "ranks": [1, 2], "images": [image, image]},
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    reader = open_source(Source(layout="datasets", path=str(tmp_path / "set"), columns=LISTS))
    said, found = read_all(reader)
    assert said[1:4] == [
        Drop("scores mean nothing", "ranks: null"),
        Drop("scores mean nothing", "ranks: []"),
        Drop("score is no number", "ranks: null"),
    ]
    assert said[5] == Drop("caption is empty", "prompt: null")
    assert found == {0: Drop("images are not as many as ranks", "1 and 2"), 4: Drop("image is missing", "images[1]")}

    grouped = [("a", "x", 1), ("a", "y", 2), (None, "z", 1), (None, "z", 2)]
    values = [{"prompt": prompt, "prompt_id": key, "rank": rank, "image": image} for key, prompt, rank in grouped]
    datasets.Dataset.from_list(values).save_to_disk(tmp_path / "groups")
    said, _ = read_all(open_source(Source(layout="datasets", path=str(tmp_path / "groups"), columns=GROUPS)))
    alone = Drop("only one image of its prompt", "prompt_id: null", damaged=False)
    assert said == [Drop("captions of a group differ", 'prompt: ["x", "y"]'), alone, alone]


# ----------------------------------------------------------------------------------------------------------------------
# Published sets, in the schemas that they have on the Hub, with the shipped configs


def shipped(name, folder):
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["config"]
    return dataclasses.replace(config.source, path=str(folder))


def test_open_image_preferences(tmp_path):
    rows = examples(4)
    write_open_image_preferences(tmp_path, rows)
    assert records(open_source(shipped("sdxl/encode_open_image_preferences", tmp_path))) == expected(rows)


def ranked_groups():
    return [(prompt, ranks, images) for (prompt, ranks), images in zip(RANKED, ranked_images(), strict=True)]


def test_image_reward_db_as_it_lies_on_the_hub(tmp_path):
    """A script of the set's name is not run."""
    ids = write_image_reward_db(tmp_path, ranked_groups())
    (tmp_path / f"{tmp_path.name}.py").write_text("raise AssertionError('the script was run')")
    check_ranks(open_source(shipped("sd15/encode_image_reward_db", tmp_path)), ids)


def test_the_configurations_of_image_reward_db(tmp_path):
    write_image_reward_groups(tmp_path / "group", ranked_groups())
    columns = Columns(caption="prompt", images=("image",), scores=("rank",), lower_wins=True)
    reader = open_source(Source(layout="datasets", path=str(tmp_path / "group"), columns=columns))
    check_ranks(reader, [[f"{row}-{place}" for place in range(len(ranks))] for row, (_, ranks) in enumerate(RANKED)])

    rows = examples(3)
    write_image_reward_pairs(tmp_path / "pair", rows)
    columns = Columns(caption="prompt", winner="img_better", loser="img_worse")
    assert records(open_source(Source(layout="datasets", path=str(tmp_path / "pair"), columns=columns))) == expected(
        rows
    )


def test_hpdv3_as_it_lies_on_the_hub_gives_what_its_own_layout_gives(tmp_path):
    rows = examples(6)
    write_hpdv3(tmp_path, rows)
    own, through = (
        read_all(open_source(source))
        for source in (Source(layout="hpdv3", path=str(tmp_path)), shipped("sdxl/encode_hpdv3", tmp_path))
    )
    assert [what._replace(margin=None) for what in own[0]] == through[0]
    for row, pair in own[1].items():
        assert through[1][row] == pair._replace(margin=None, names=("winner, column path1", "loser, column path2"))


@pytest.mark.parametrize("version", [1, 2])
def test_pick_a_pic_gives_what_its_own_layout_gives(tmp_path, version):
    rows = examples(7, ties=[3])
    write_pick_a_pic(tmp_path, rows)
    for file in (tmp_path / "data").iterdir():
        written = pq.read_table(file)
        labels = written["has_label"].to_pylist()
        written = written.set_column(written.column_names.index("has_label"), "has_label", [[False, *labels[1:]]])
        pq.write_table(written if version == 2 else written.drop_columns(["__index_level_0__"]), file)
    source = shipped("sd15/encode_pick_a_pic_v1", tmp_path)
    own, through = (read_all(open_source(each)) for each in (Source(layout="pick_a_pic", path=str(tmp_path)), source))
    for mine, other in zip(own[0], through[0], strict=True):
        if isinstance(mine, Judgement):
            assert other == mine._replace(models=None, margin=1.0)
        else:
            assert other == mine if isinstance(mine, Tie) else other == Drop("has_label is false", damaged=False)
    assert {row: pair[:7] for row, pair in own[1].items()} == {row: pair[:7] for row, pair in through[1].items()}


# ----------------------------------------------------------------------------------------------------------------------
# On the Hub


READ_HUB = """
import hashlib, json, sys
import datasets
from flax_pref.data.pairs import pairs
from flax_pref.data.sources import Source, mark, open_source

datasets.disable_progress_bars()
for settings in json.loads(sys.argv[1]):
    reader = open_source(Source.from_settings(settings))
    images = [[hashlib.sha256(data).hexdigest() for data in both] for both in reader.images(range(len(reader)))]
    files = [str(file) for file in reader.image_files([0])]
    told = {"captions": [said.caption for said in reader.judgements(range(len(reader)))], "images": images}
    marks = list(map(mark, reader.image_files([0])))
    print(json.dumps(told | {"where": reader.where(3), "files": files, "marks": marks}))
"""


def read_hub(sources, home, address=None):
    """What a program of its own reads: clients take the address of the Hub when they are imported."""
    reached = {"HF_HUB_OFFLINE": "1"} if address is None else {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", READ_HUB, json.dumps([source.settings() for source in sources])],
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(home), **reached},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_hub_id_is_streamed_by_row_or_downloaded_once_and_read_without_the_hub_then(tmp_path):
    rows, folder = examples(5), tmp_path / "hub"
    write_parquet(folder / "bytes", rows)
    names = write_images(folder / "images", rows)
    write_parquet(folder / "paths", rows, lambda data: f"images/{names[data]}")  # relative to the repository
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: bytes\n  data_files: bytes/data/*.parquet\n"
        "- config_name: paths\n  data_files: paths/data/*.parquet\n---\n"
    )
    parquet = Source(layout="datasets", path="owner/name", name="bytes", columns=SCORES)
    streamed = dataclasses.replace(parquet, stream=True, revision="v1")
    paths = dataclasses.replace(streamed, name="paths")
    with local_hub.serving(folder) as (address, asked):
        found = read_hub([streamed, paths, parquet], tmp_path / "home", address)
    whole = [request for request in asked if request.startswith("GET") and request.endswith(".parquet")]
    assert len(whole) == 2 and all("/bytes/" in request for request in whole), whole  # all others are of a range
    found += read_hub([parquet], tmp_path / "home")
    for told in found:
        assert told["captions"] == [row.caption for row in rows]
        assert told["images"] == [[hashlib.sha256(data).hexdigest() for data in row.images] for row in rows]
    root = f"hf://datasets/owner/name@{local_hub.COMMIT}"
    assert found[0]["where"] == [f"{root}/bytes/data/train-00001-of-00002.parquet", 1]
    assert found[0]["files"] == [f"{root}/bytes/data/train-00000-of-00002.parquet"]
    assert found[1]["files"] == [
        f"{root}/{name}" for name in ("paths/data/train-00000-of-00002.parquet", "images/0.jpg", "images/1.jpg")
    ]
    assert found[2]["where"] == found[3]["where"] == ["owner/name, split train", 3]
    assert found[2]["files"] == found[3]["files"] and found[2]["marks"] == found[3]["marks"]
    assert all("blob_id" in mark for mark in (*found[0]["marks"], *found[1]["marks"]))


def test_a_hub_that_cannot_be_reached_and_a_set_that_is_nowhere_are_one_line(tmp_path):
    for path, message in (
        ("owner/name", r"owner/name: no such file or folder, and the Hub cannot be reached .*; connect to the network"),
        ("no id", "no id: no such file or folder, and not the id of a dataset of the Hub"),
        (str(tmp_path), "datasets finds no such set or files"),
    ):
        with pytest.raises(FileNotFoundError, match=message) as caught:
            open_source(Source(layout="datasets", path=path, columns=ROLES))
        assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong


@pytest.mark.parametrize("how", STORED)
def test_a_missing_column_and_one_of_another_type_name_the_set_and_the_columns(tmp_path, how):
    source = stored(tmp_path / "set", examples(2), how)
    for columns, message in (
        (
            dataclasses.replace(ROLES, winner="chosen"),
            r"no column 'chosen' for columns\.winner; there are .*'image_0'.*",
        ),
        (dataclasses.replace(ROLES, caption="score_0"), r"'score_0' is of type .*; columns\.caption expects texts"),
        (dataclasses.replace(ROLES, loser="score_0"), r"'score_0' is of type .*; columns\.loser expects images"),
        (dataclasses.replace(SCORES, scores=("prompt", "score_1")), r"'prompt' is .*; columns\.scores expects numbers"),
    ):
        with pytest.raises(ValueError, match=rf"^{tmp_path}.*: (column )?{message}") as caught:
            open_source(dataclasses.replace(source, columns=columns))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["save_to_disk", "parquet", "json"])
@pytest.mark.parametrize("stream", [False, True])
def test_damaged_rows_are_dropped_with_their_column_and_the_others_stay(tmp_path, how, stream):
    rows = examples(6)
    rows[1] = rows[1]._replace(caption="")
    rows[2] = rows[2]._replace(winner=rows[2].winner[:300])
    rows[3] = rows[3]._replace(loser=b"<html>404 Not Found</html>")
    reader = open_source(stored(tmp_path / "set", rows, how, stream=stream))
    selection = select(reader, Choice())
    assert selection.drops == {1: Drop("caption is empty", 'prompt: ""')}
    encoder = PairEncoder.__new__(PairEncoder)
    encoder.encoding, encoder.sizes = Encoding(size=(32, 32)), [(32, 32)]
    found = dict(map(encoder._fit, zip(selection.rows.tolist(), pairs(reader, selection.rows.tolist()), strict=True)))
    assert [row for row, what in found.items() if isinstance(what, Drop)] == [2, 3]
    assert found[2].detail.startswith("winner, column image_0: 300 bytes")
    assert found[3].reason == "not an image" and found[3].detail.startswith("loser, column image_0: 26 bytes")


def test_nulls_and_values_that_mean_nothing_are_dropped_with_their_column(tmp_path):
    rows = [record(row, as_struct) for row in examples(8)]
    rows[0]["prompt"] = None
    rows[1]["score_0"] = float("nan")
    rows[2]["score_1"] = None
    rows[3]["image_1"] = None
    rows[4]["image_0"] = {"bytes": None, "path": None}
    rows[5]["image_0"] = {"bytes": None, "path": "/etc/hostname"}
    rows[6]["image_0"] = {"bytes": None, "path": "../outside.jpg"}
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    reader = open_source(Source(layout="datasets", path=str(tmp_path / "set"), columns=SCORES))
    said, found = read_all(reader)
    assert said[0] == Drop("caption is empty", "prompt: null")
    assert said[1] == Drop("score is no number", "score_0: NaN") and said[2].detail == "score_1: null"
    assert found[3] == Drop("image is missing", "image_1") and found[4] == Drop("image is missing", "image_0")
    assert found[5] == Drop("path leaves the folder of the set", 'image_0: "/etc/hostname"')
    assert found[6] == Drop("path leaves the folder of the set", 'image_0: "../outside.jpg"')
    assert not isinstance(found[7], Drop)

    rows = [record(row, as_struct) for row in examples(2)]
    rows[0]["better"], rows[1]["better"] = None, "2"
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "labels")
    said, _ = read_all(open_source(Source(layout="datasets", path=str(tmp_path / "labels"), columns=LABEL)))
    assert said[0] == Drop("no label", "better", damaged=False)
    assert said[1] == Drop("labels mean nothing", 'better: "2"; expected one of 0, 1, tie')


def test_paths_stay_within_the_set(tmp_path):
    rows = examples(4)
    source = stored(tmp_path / "set", rows, "json", ROLES)
    (tmp_path / "outside.jpg").write_bytes(rows[0].winner)
    (tmp_path / "set" / "images" / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    file = tmp_path / "set" / "train-0.jsonl"
    first, second = map(json.loads, file.read_text().splitlines())
    for path, reason in (
        ("../outside.jpg", "path leaves the folder of the set"),
        (str(tmp_path / "outside.jpg"), "path leaves the folder of the set"),
        ("images/link.jpg", "path leaves the folder of the set"),
        ("images/none.jpg", "image is missing"),
        (first["loser"], "both images are the same"),
        ("", "path is missing"),
        (None, "path is missing"),
    ):
        file.write_text(f"{json.dumps(first | {'winner': path})}\n{json.dumps(second)}")
        said, found = read_all(open_source(source))
        drop = said[0] if isinstance(said[0], Drop) else found[0]
        assert drop.reason == reason and ("winner" in drop.detail or drop.detail == path)
        assert found[1][1:4] == rows[1][:3]


@pytest.mark.parametrize("how", ["save_to_disk", "parquet", "arrow", "json", "csv"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_damaged_file_is_one_line_that_names_it_or_its_set(tmp_path, how, stream, capsys):
    source = stored(tmp_path / "set", examples(4), how, stream=stream)
    for file in (tmp_path / "set").rglob("*"):
        if file.suffix in (".arrow", ".parquet", ".jsonl", ".csv"):
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) * 2 // 3] if how != "csv" else b"\xff\xfe\x00" + whole)
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'set'}") as caught:
        read_all(open_source(source))
    assert "\n" not in str(caught.value) and not capsys.readouterr().err


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("change", [{"prompt": 7}, {"prompt": ["a"]}, {"score_0": "high"}, {"image_0": 5}])
def test_a_value_of_another_type_in_json_is_one_line_with_file_column_and_row(tmp_path, change, stream, capsys):
    """Left to itself, `datasets` would make JSON of all values of that column in that file: captions with quotes."""
    source = stored(tmp_path / "set", examples(4), "json", stream=stream)
    file = tmp_path / "set" / "train-1.jsonl"
    first, second = map(json.loads, file.read_text().splitlines())
    file.write_text(f"{json.dumps(first)}\n{json.dumps(second | change)}")
    (name,) = change
    with pytest.raises(ValueError, match=rf"^{file}: .*Column\(/{name}\) changed from .* in row 1\)") as caught:
        open_source(source)
    assert "\n" not in str(caught.value) and not capsys.readouterr().err


@pytest.mark.parametrize(("how", "stream"), [("save_to_disk", False), ("arrow", True)])
def test_a_text_that_would_end_far_beyond_its_file_is_not_read(tmp_path, how, stream):
    """Arrow takes places for granted: it would end the program, or show its memory."""
    source = stored(tmp_path / "set", examples(4), how, stream=stream)
    (file,) = (tmp_path / "set").glob("*.arrow")
    whole, places = file.read_bytes(), struct.pack("<5i", 0, 9, 18, 27, 36)  # of "caption 0" and so on
    assert whole.count(places) == 1
    file.write_bytes(whole.replace(places, struct.pack("<5i", 0, 9, 2**31 - 1, 27, 36)))
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'set'}.*: datasets cannot read it") as caught:
        read_all(open_source(source))
    assert "\n" not in str(caught.value)


def test_splits_configurations_and_revisions_that_are_not_there_are_named(tmp_path):
    rows = examples(2)
    for how in ("splits of save_to_disk", "parquet"):
        source = stored(tmp_path / how, rows, how)
        with pytest.raises(
            FileNotFoundError, match=r"no split 'dev'; there are (test, )?train: choose with --source\.s"
        ):
            open_source(dataclasses.replace(source, split="dev"))
        with pytest.raises(ValueError, match=r"local folder, which has no revision 'main'; leave source\.revision out"):
            open_source(dataclasses.replace(source, revision="main"))
    assert (
        len(open_source(dataclasses.replace(source, path=str(tmp_path / "splits of save_to_disk"), split="test"))) == 1
    )
    with pytest.raises(ValueError, match="was written by save_to_disk, which has no name; leave it out"):
        open_source(dataclasses.replace(source, path=str(tmp_path / "splits of save_to_disk"), name="x"))
    with pytest.raises(ValueError, match=r"BuilderConfig 'x' not found.*choose with --source\.name"):
        open_source(dataclasses.replace(source, name="x"))
    with pytest.raises(
        ValueError, match=r"gs://b/set: layout datasets reads local folders and Hub ids; mount the buck"
    ):
        open_source(dataclasses.replace(source, path="gs://b/set"))
    file = tmp_path / "parquet" / "data" / "train-00000-of-00002.parquet"
    assert records(open_source(dataclasses.replace(source, path=str(file)))) == expected(rows[:1])


def test_columns_that_contradict_each_other_are_refused():
    for columns, message in (
        ({"winner": "a"}, "winner and loser come together"),
        (
            {"winner": "a", "loser": "b", "label": "c"},
            "expected winner and loser; or images with label; or images with",
        ),
        ({"images": ("a", "b")}, "expected winner and loser; or images with label"),
        ({"images": ("a", "b"), "label": "c"}, "expected the values of label"),
        ({"images": ("a", "b"), "label": "c", "first": ("1",), "second": ("1",)}, "each once"),
        ({"images": ("a",), "label": "c", "first": ("1",), "second": ("2",)}, "a label compares two images"),
        ({"images": ("a", "b"), "scores": ("c",)}, "expected two of each"),
        ({"images": ("a", "b", "c"), "scores": ("d", "e", "f")}, "expected two of each"),
        ({"images": ("a", "b"), "scores": ("c", "d"), "group": "e"}, "group needs one column of images"),
        ({"winner": "a", "loser": "b", "lower_wins": True}, "lower_wins says how scores are read"),
        ({"winner": "a", "loser": "b", "ids": ("c",)}, "ids=.*expected 2 columns"),
    ):
        with pytest.raises(ValueError, match=message):
            Columns(**columns)
    with pytest.raises(ValueError, match=r"layout datasets needs the columns of the images: name columns\.winner"):
        Source(layout="datasets", path="a")
    for setting in ({"name": "8k"}, {"revision": "main"}, {"files": ("a",)}, {"stream": True}, {"columns": ROLES}):
        (name,) = setting
        with pytest.raises(
            ValueError, match=f"source: {name} is a setting of layout datasets, not of folder; leave it"
        ):
            Source(layout="folder", path="a", **setting)


# ----------------------------------------------------------------------------------------------------------------------
# Settings, and what is imported


def test_settings_come_back_from_json_and_those_of_other_layouts_are_as_they_were():
    source = Source(layout="datasets", path="a", name="8k", files=("*.json",), columns=LABEL)
    assert Source.from_settings(json.loads(json.dumps(source.settings()))) == source
    folder = Source(layout="folder", path="a")
    assert folder.settings() == {"layout": "folder", "path": "a", "split": "train"}
    assert Source.from_settings(folder.settings()) == folder


def test_columns_are_flags_of_the_program():
    flags = ["configs/sdxl/encode_open_image_preferences.py", "--source.columns.winner", "best", "--source.stream"]
    flags += ["--source.columns.required", "checked", "--source.revision", "abc"]
    source = load_config(flags, EncodeConfig).source
    assert source.columns == Columns(caption="prompt", winner="best", loser="rejected", required=("checked",))
    assert source.stream and source.revision == "abc"


def test_datasets_is_imported_only_for_its_sets_and_brings_neither_torch_nor_tensorflow(tmp_path):
    rows = examples(2)
    sources = [stored(tmp_path / how, rows, how, stream=how == "json") for how in ("save_to_disk", "json", "images")]
    code = (
        "import sys, json; from flax_pref.data.sources import Source, open_source\n"
        "assert 'datasets' not in sys.modules and 'pandas' not in sys.modules\n"
        "for settings in json.loads(sys.argv[1]):\n"
        "    reader = open_source(Source.from_settings(settings)); said = list(reader.judgements(range(2)))\n"
        "    assert len(list(reader.images([0, 1]))) == 2 and 'datasets' in sys.modules\n"
        "print([name for name in ('torch', 'tensorflow', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([source.settings() for source in sources])],
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"
