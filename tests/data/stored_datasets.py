"""Preference sets as `datasets` writes them, and loads them from."""

import itertools
import json
import shutil
from collections.abc import Callable, Sequence

import datasets
import huggingface_hub

from flax_pref.data.columns import Columns
from flax_pref.data.sources import Source
from tests.data.preference_sets import Example

SCORES = Columns(caption="prompt", images=("image_0", "image_1"), scores=("score_0", "score_1"))


def offline(cache, monkeypatch):
    """`datasets` with a cache of its own and no Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def record(row: Example, form=dict):
    """A row with all columns that the tests name; `form` makes an image of a number and bytes."""
    better = "tie" if row.tie else "0" if row.winner_first else "1"
    scores = dict(zip(("score_0", "score_1"), row.labels, strict=True))
    images = {"winner": row.winner, "loser": row.loser, "image_0": row.images[0], "image_1": row.images[1]}
    return {"prompt": row.caption, "better": better, **scores, **{name: form(data) for name, data in images.items()}}


def as_struct(data):
    return {"bytes": data, "path": None}


def table(rows, form=as_struct):
    """The rows as `datasets` has them, with Image features."""
    found = datasets.Dataset.from_list([record(row, form) for row in rows])
    if form is as_struct:
        for name in ("winner", "loser", "image_0", "image_1"):
            found = found.cast_column(name, datasets.Image())
    return found


def write_images(folder, rows):
    """Files of their own; the function gives the name of one by its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for number, data in enumerate(itertools.chain.from_iterable((row.winner, row.loser) for row in rows)):
        names[data] = f"{number}.jpg"
        (folder / names[data]).write_bytes(data)
    return names


def write_saved(folder, rows):
    table(rows).save_to_disk(folder)


def write_saved_splits(folder, rows):
    datasets.DatasetDict({"train": table(rows), "test": table(rows[:1])}).save_to_disk(folder)


def write_parquet(folder, rows, form=as_struct):
    half = len(rows) // 2
    for number, some in enumerate((rows[:half], rows[half:])):
        table(some, form).to_parquet(folder / "data" / f"train-{number:05d}-of-00002.parquet", batch_size=2)


def write_bytes(folder, rows):
    write_parquet(folder, rows, form=lambda data: data)


def write_arrow(folder, rows):
    write_saved(folder / "saved", rows)
    for file in (folder / "saved").glob("*.arrow"):
        file.rename(folder / "train.arrow")
    shutil.rmtree(folder / "saved")


def write_json(folder, rows):
    names = write_images(folder / "images", rows)
    half = len(rows) // 2
    for number, some in enumerate((rows[:half], rows[half:])):
        lines = (json.dumps(record(row, lambda data: f"images/{names[data]}")) for row in some)
        (folder / f"train-{number}.jsonl").write_text("\n".join(lines))


def write_csv(folder, rows):
    names = write_images(folder / "images", rows)
    table(rows, lambda data: f"images/{names[data]}").to_csv(folder / "train.csv")


def write_image_folder(folder, rows):
    names = write_images(folder / "train", rows)
    lines = []
    for row in rows:
        values = record(row, lambda data: names[data])
        images = {f"{name}_file_name": values.pop(name) for name in ("winner", "loser", "image_0", "image_1")}
        lines.append(json.dumps(values | images))
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))


# ----------------------------------------------------------------------------------------------------------------------
# Published sets, in the schemas that they have on the Hub

RATINGS = ("overall_rating", "image_text_alignment_rating", "fidelity_rating")
Group = tuple[str, Sequence[int], Sequence[bytes]]  # a prompt, ranks of its images and these


def write_open_image_preferences(folder, rows):
    """Columns prompt, chosen and rejected: github.com/AIDC-AI/CHATS maps them so for its training on this set."""
    features = {name: datasets.Image() for name in ("chosen", "rejected")} | {"prompt": datasets.Value("string")}
    datasets.Dataset.from_list(
        [{"chosen": as_struct(r.winner), "rejected": as_struct(r.loser), "prompt": r.caption} for r in rows],
        features=datasets.Features(features),
    ).to_parquet(folder / "data" / "train-00000-of-00001.parquet")


def write_image_reward_db(folder, groups: Sequence[Group]):
    """metadata-train.parquet, and images/train/train_1.zip extracted; gives the paths of the images of each group."""
    values, ids = [], []
    for number, (prompt, ranks, images) in enumerate(groups):
        ids.append([])
        for place, (rank, data) in enumerate(zip(ranks, images, strict=True)):
            path = f"images/train/train_1/{number}-{place}.webp"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
            ids[-1].append(path)
            known = {"image_path": path, "prompt_id": f"00{number}", "prompt": prompt, "classification": "People"}
            values.append(known | {"image_amount_in_total": len(ranks), "rank": rank} | dict.fromkeys(RATINGS, 4))
    for split in ("train", "test"):
        datasets.Dataset.from_list(values).to_parquet(folder / f"metadata-{split}.parquet")
    return ids


def _common_of_image_reward_db():
    return {name: datasets.Value("string") for name in ("prompt_id", "prompt", "classification")}


def write_image_reward_groups(folder, groups: Sequence[Group]):
    """The configuration 8k_group, with the features that ImageRewardDB.py gives it."""
    small = datasets.Value("int8")
    features = _common_of_image_reward_db() | {"image": datasets.List(datasets.Image()), "rank": datasets.List(small)}
    features |= dict.fromkeys(RATINGS, datasets.List(small))
    datasets.Dataset.from_list(
        [
            {
                "prompt_id": "1",
                "prompt": prompt,
                "classification": "",
                "image": list(map(as_struct, some)),
                "rank": ranks,
            }
            | dict.fromkeys(RATINGS, ranks)
            for prompt, ranks, some in groups
        ],
        features=datasets.Features(features),
    ).to_parquet(folder / "train.parquet")


def write_image_reward_pairs(folder, rows):
    """The configuration 8k_pair."""
    images = {"img_better": datasets.Image(), "img_worse": datasets.Image()}
    datasets.Dataset.from_list(
        [
            {"prompt_id": "1", "prompt": row.caption, "classification": ""}
            | {"img_better": as_struct(row.winner), "img_worse": as_struct(row.loser)}
            for row in rows
        ],
        features=datasets.Features(_common_of_image_reward_db() | images),
    ).save_to_disk(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Every way to store a set

# How sets are stored: what writes them, and which files are named for them.
STORED: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "save_to_disk": (write_saved, ()),
    "splits of save_to_disk": (write_saved_splits, ()),
    "parquet": (write_parquet, ()),
    "bytes in parquet": (write_bytes, ()),
    "arrow": (write_arrow, ()),
    "json": (write_json, ("*.jsonl",)),
    "csv": (write_csv, ("train.csv",)),
    "images": (write_image_folder, ()),
}


def stored(folder, rows, how, columns=SCORES, **settings):
    """A set that was written, to be opened."""
    folder.mkdir(parents=True, exist_ok=True)
    STORED[how][0](folder, rows)
    return source_of(folder, how, columns=columns, **settings)


def source_of(folder, how, *, columns=SCORES, **settings):
    """Where a set was written."""
    return Source(layout="datasets", path=str(folder), columns=columns, files=STORED[how][1], **settings)
