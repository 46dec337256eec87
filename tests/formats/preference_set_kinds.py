"""Kinds of preference sets: who won each row, with which caption and images, as they were written."""

import dataclasses
import io
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flax_pref.data.columns import Columns
from flax_pref.data.images import decode_image
from flax_pref.data.pairs import Drop, PairReader, PreferencePair, Tie
from flax_pref.data.pick_a_pic import LabelledPair, write_pairs
from flax_pref.data.sources import Layout, Source, open_source
from tests.data.preference_sets import (
    Example,
    examples,
    read_all,
    write_hpdv2,
    write_hpdv3,
    write_pair_folder,
    write_pick_a_pic,
    write_tars,
)
from tests.formats.kinds import Kind, Made, Numbers

ROOT = Path(__file__).parents[2]
TIE = 2  # the row that is one, where a set has ties
Write = Callable[[Path, Sequence[Example]], Any]


def rows(*, ties: bool) -> list[Example]:
    """Rows of a set."""
    return examples(4, ties=[TIE] if ties else [])


def numbers(reader: PairReader) -> Numbers:
    """Captions and pixels of each row that has a winner.

    Raises:
        ValueError: a row is left out; says why.
    """
    said, found = read_all(reader)
    read: dict[str, np.ndarray] = {}
    for row, what in enumerate(said):
        pair = found.get(row, what)
        if isinstance(pair, Tie):
            continue
        images = [] if isinstance(pair, Drop) else [decode_image(data) for data in (pair.winner, pair.loser)]
        if drop := next((part for part in (pair, *images) if isinstance(part, Drop)), None):
            raise ValueError(f"{reader.where(row)[0]}: row {row} is left out: {drop.reason} ({drop.detail})")
        read |= {f"{row} {name}": array for name, array in of_pair(pair.caption, *images).items()}
    return read


def of_pair(caption: str, winner: Any, loser: Any) -> Numbers:
    """A pair in numbers."""
    return {
        "caption": np.frombuffer(caption.encode(), np.uint8),
        "winner": np.asarray(winner),
        "loser": np.asarray(loser),
    }


def written(written: Sequence[Example]) -> Numbers:
    """The same of the rows that were written, decoded by Pillow."""
    return {
        f"{number} {name}": array
        for number, row in enumerate(written)
        if not row.tie
        for name, array in of_pair(row.caption, *map(pixels, (row.winner, row.loser))).items()
    }


def pixels(data: bytes) -> np.ndarray:
    """Of an image file."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def made_by(write: Write, *, ties: bool = True, path: str = "") -> Callable[[Path], Made]:
    """A set of these rows; `path` is what a user names, within its folder."""

    def make(folder: Path) -> Made:
        some = rows(ties=ties)
        (folder / "set").mkdir()
        write(folder / "set", some)
        return Made(folder / "set" / path, lambda: written(some))

    return make


def opened(layout: Layout, **settings: Any) -> Callable[[Path], PairReader]:
    """Reads a set in a layout."""
    return lambda path: open_source(Source(layout=layout, path=str(path), **settings))


def shipped(config: str) -> Callable[[Path], PairReader]:
    """Reads a set as a shipped config does."""

    def read(path: Path) -> PairReader:
        source = runpy.run_path(str(ROOT / "configs" / f"{config}.py"))["config"].source
        return open_source(dataclasses.replace(source, path=str(path)))

    return read


def write_again(reader: PairReader, folder: Path) -> Path:
    """The pairs as Pick-a-Pic."""
    pairs = [
        LabelledPair(pair.caption, pair.winner, pair.loser, 1.0, f"{row}-0", f"{row}-1", "a", "b")
        if isinstance(pair := read_all(reader)[1].get(row), PreferencePair)
        else LabelledPair(
            "a tie", rows(ties=False)[0].winner, rows(ties=False)[0].loser, 0.5, f"{row}-0", f"{row}-1", "a", "b"
        )
        for row in range(len(reader))
    ]
    write_pairs(folder / "pairs.parquet", pairs)
    return folder / "pairs.parquet"


def groups(some: Sequence[Example]) -> list[tuple[str, list[int], tuple[bytes, bytes]]]:
    """Rows as prompts with two ranked images, the better one of rank 1."""
    return [(row.caption, [1, 1] if row.tie else [1, 2] if row.winner_first else [2, 1], row.images) for row in some]


def stored(how: str) -> Write:
    """Writes a set as `datasets` does."""
    from tests.data.stored_datasets import STORED

    return STORED[how][0]


def published(name: str) -> Write:
    """Writes a set in the schema of a published one."""

    def write(folder: Path, some: Sequence[Example]) -> None:
        from tests.data import stored_datasets

        getattr(stored_datasets, name)(folder, some if name.endswith(("preferences", "pairs")) else groups(some))

    return write


def pick_a_pic_v1(folder: Path, some: Sequence[Example]) -> None:
    """Without the last column of version 2."""
    import pyarrow.parquet as pq

    write_pick_a_pic(folder, some, files=1)
    for file in (folder / "data").iterdir():
        pq.write_table(pq.read_table(file).drop_columns(["__index_level_0__"]), file)


# ----------------------------------------------------------------------------------------------------------------------
# The rows

SURPLUS = {"surplus ": "columns that are not named are not read"}
HALF = SURPLUS | {"shape txt": "half a caption is a caption"}
PARQUET = "data/train-00000-of-00001-0123456789abcdef.parquet"
PICK_A_PIC = ("caption", "jpg_0", "jpg_1", "label_0", "label_1", "are_different", "has_label", "image_0_uid")
# Reasons of rows that are left out name the row, and say what its fields are.
LIST_OF_HPD = {
    "names": lambda key: {"prompt": "caption", "file_path": "images", "human_preference": "labels"}.get(key, "path")
}
NAMED = ("prompt", "image_0", "image_1", "score_0", "score_1")
SCORES = Columns(caption="prompt", images=("image_0", "image_1"), scores=("score_0", "score_1"))


def preference_set(name: str, make: Callable[[Path], Made], load: Callable[[Path], PairReader], **more: Any) -> Kind:
    """A row; `columns` are those that are read and have no default."""
    columns = more.pop("columns")
    settings = {"reference": "what was written, decoded by Pillow", "needs": (), "harmless": SURPLUS} | more
    settings |= {"sort": lambda key: key if key in columns else None}
    return Kind(name=name, make=make, load=load, numbers=numbers, surplus="other", **settings)


def of_layout(name: str, layout: Layout, make: Callable[[Path], Made], **more: Any) -> Kind:
    """A row of a layout of its own."""
    return preference_set(name, make, opened(layout), **{"read": f"`--source.layout {layout}`"} | more)


def of_datasets(
    name: str, make: Callable[[Path], Made], load: Callable[[Path], PairReader] | None = None, **more: Any
) -> Kind:
    """A row that `datasets` reads."""
    files = more.pop("files", ())
    load = opened("datasets", columns=SCORES, files=files) if load is None else load
    reference = "what `datasets` was given, decoded by Pillow"
    return preference_set(name, make, load, **{"read": "`--source.layout datasets`", "reference": reference} | more)


PREFERENCE_SETS = (
    of_layout(
        "Pick-a-Pic v2, parquet",
        "pick_a_pic",
        made_by(lambda folder, some: write_pick_a_pic(folder, some, files=1)),
        damaged=PARQUET,
        written="`flax_pref.data.pick_a_pic.write_pairs`",
        write=write_again,
        columns=PICK_A_PIC,
    ),
    of_datasets(
        "Pick-a-Pic v1, parquet",
        made_by(pick_a_pic_v1),
        shipped("sd15/encode_pick_a_pic_v1"),
        damaged=PARQUET,
        columns=PICK_A_PIC[:6],
    ),
    of_layout(
        "HPDv2, JSON and images",
        "hpdv2",
        made_by(write_hpdv2, path="train.json"),
        **LIST_OF_HPD,
        columns=("prompt", "file_path", "human_preference"),
    ),
    of_layout(
        "HPDv3, JSON and images",
        "hpdv3",
        made_by(write_hpdv3, ties=False, path="train.json"),
        **LIST_OF_HPD,
        columns=("prompt", "path1", "path2"),
    ),
    of_datasets(
        "HPDv3 as it lies on the Hub",
        made_by(write_hpdv3, ties=False),
        shipped("sdxl/encode_hpdv3"),
        damaged="train.json",
        columns=("prompt", "path1", "path2"),
    ),
    of_datasets(
        "ImageRewardDB, metadata and images",
        made_by(published("write_image_reward_db")),
        shipped("sd15/encode_image_reward_db"),
        damaged="metadata-train.parquet",
        columns=("prompt", "prompt_id", "image_path", "rank"),
    ),
    of_datasets(
        "ImageRewardDB, groups",
        made_by(published("write_image_reward_groups")),
        opened("datasets", columns=Columns(caption="prompt", images=("image",), scores=("rank",), lower_wins=True)),
        damaged="train.parquet",
        columns=("prompt", "image", "rank"),
    ),
    of_datasets(
        "ImageRewardDB, pairs",
        made_by(published("write_image_reward_pairs"), ties=False),
        opened("datasets", columns=Columns(caption="prompt", winner="img_better", loser="img_worse")),
        damaged="data-00000-of-00001.arrow",
        columns=("prompt", "img_better", "img_worse"),
        harmless={},
    ),
    of_datasets(
        "Open Image Preferences, binarized",
        made_by(published("write_open_image_preferences"), ties=False),
        shipped("sdxl/encode_open_image_preferences"),
        damaged="data/train-00000-of-00001.parquet",
        columns=("prompt", "chosen", "rejected"),
    ),
    of_layout(
        "WebDataset with labels",
        "webdataset",
        made_by(lambda folder, some: write_tars(folder, some, files=1)),
        damaged="00000.tar",
        columns=("0.jpg", "1.jpg", "json", "txt"),
        harmless=HALF,
        names=lambda key: "row 0",
    ),
    of_layout(
        "WebDataset with winner and loser",
        "webdataset",
        made_by(lambda folder, some: write_tars(folder, some, labelled=False, files=1), ties=False),
        damaged="00000.tar",
        columns=("winner.jpg", "loser.jpg", "txt"),
        harmless=HALF,
        names=lambda key: "row 0",
    ),
    of_layout(
        "folder of pairs (`pairs.jsonl`)",
        "folder",
        made_by(write_pair_folder),
        damaged="pairs.jsonl",
        columns=("prompt", "winner", "loser"),
        names=lambda key: {"prompt": "caption"}.get(key, key),
    ),
    *(
        of_datasets(
            f"{told} of `datasets`",
            made_by(lambda folder, some, how=how: stored(how)(folder, some)),
            damaged=damaged,
            files=files,
            columns=NAMED,
            **more,
        )
        for told, how, damaged, files, more in (
            ("`save_to_disk`", "save_to_disk", "data-00000-of-00001.arrow", (), {"harmless": {}}),
            (
                "splits of `save_to_disk`",
                "splits of save_to_disk",
                "train/data-00000-of-00001.arrow",
                (),
                {"harmless": {}},
            ),
            ("parquet, images in columns,", "parquet", "data/train-00000-of-00002.parquet", (), {}),
            ("parquet, bytes in columns,", "bytes in parquet", "data/train-00000-of-00002.parquet", (), {}),
            ("Arrow file", "arrow", "train.arrow", (), {}),
            ("JSON lines and images", "json", "train-0.jsonl", ("*.jsonl",), {"names": lambda key: ""}),
            ("CSV and images", "csv", "train.csv", ("train.csv",), {}),
            ("folder of images (`metadata.jsonl`)", "images", "train/metadata.jsonl", (), {"names": lambda key: ""}),
        )
    ),
)
