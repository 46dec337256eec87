"""Small preference sets in the layouts that they are published in."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from flax_pref.data.pairs import Drop, Judgement, PairReader, PreferencePair, Tie, pairs
from flax_pref.data.pick_a_pic import LabelledPair, write_pairs


class Example(NamedTuple):
    """One row of a set."""

    caption: str
    winner: bytes
    loser: bytes
    winner_first: bool = True
    tie: bool = False

    @property
    def images(self) -> tuple[bytes, bytes]:
        """In the order of the row."""
        return (self.winner, self.loser) if self.winner_first else (self.loser, self.winner)

    @property
    def labels(self) -> tuple[float, float]:
        return (0.5, 0.5) if self.tie else (1.0, 0.0) if self.winner_first else (0.0, 1.0)


def encoded_image(number: int, size: tuple[int, int] = (40, 48), image_format: str = "JPEG") -> bytes:
    """An image of its own for each number; `size` is height and width."""
    pixels = np.random.default_rng([number]).integers(0, 256, (5, 6, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC).save(file, image_format)
    return file.getvalue()


def examples(count: int, *, size: tuple[int, int] = (40, 48), ties: Sequence[int] = ()) -> list[Example]:
    """Rows that all differ; the winner is first in every other row."""
    return [
        Example(f"caption {i}", encoded_image(2 * i, size), encoded_image(2 * i + 1, size), i % 2 == 0, i in ties)
        for i in range(count)
    ]


def write_pick_a_pic(folder: Path, rows: Sequence[Example], *, files: int = 2, split: str = "train") -> Path:
    """The folder that holds data/SPLIT-00000-of-0000N-HASH.parquet, with two rows in each row group."""
    each = -(-len(rows) // files)
    for number in range(files):
        write_pairs(
            folder / "data" / f"{split}-{number:05d}-of-{files:05d}-0123456789abcdef.parquet",
            [
                LabelledPair(row.caption, *row.images, row.labels[0], f"{i}-0", f"{i}-1", "sdxl", "sd15")
                for i, row in list(enumerate(rows))[number * each : (number + 1) * each]
            ],
            rows_per_group=2,
        )
    return folder


def write_hpdv2(folder: Path, rows: Sequence[Example]) -> Path:
    """train.json, beside the folder train/ as train.tar.gz is extracted."""
    records = []
    for i, row in enumerate(rows):
        names = [f"{i:08d}.jpg", f"{i:08d}-b.jpg"]
        _write(folder / "train", names, row.images)
        labels = [0.5, 0.5] if row.tie else [int(row.winner_first), int(not row.winner_first)]
        records.append({"prompt": row.caption, "file_path": names, "human_preference": labels, "user_hash": "u"})
    return _write_json(folder / "train.json", records)


def write_hpdv3(folder: Path, rows: Sequence[Example]) -> Path:
    """train.json, beside the folder images/ as the archive is extracted; ties cannot be told in it."""
    records = []
    for i, row in enumerate(rows):
        names = [f"images/{i}-winner.jpg", f"images/{i}-loser.jpg"]
        _write(folder, names, (row.winner, row.loser))
        paths = {"path1": names[0], "path2": names[1], "model1": "sdxl", "model2": "sd15"}
        known = {"confidence": 0.9, "choice_dist": [9, 1]} if i % 2 else {"confidence": None, "choice_dist": None}
        records.append({"prompt": row.caption, **known, **paths})
    return _write_json(folder / "train.json", records)


def write_pair_folder(folder: Path, rows: Sequence[Example]) -> Path:
    """The folder that holds pairs.jsonl and the images."""
    lines = []
    for i, row in enumerate(rows):
        names = [f"images/{i}-winner.jpg", f"images/{i}-loser.jpg"]
        _write(folder, names, (row.winner, row.loser))
        record = {"prompt": row.caption, "winner": names[0], "loser": names[1]}
        lines.append(json.dumps(record | ({"tie": True} if row.tie else {})) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder


def write_tars(folder: Path, rows: Sequence[Example], *, labelled: bool = True, files: int = 2) -> Path:
    """The folder that holds 00000.tar and so on, with labels (0, 1), or winner and loser where ties cannot be told."""
    folder.mkdir(parents=True, exist_ok=True)
    each = -(-len(rows) // files)
    for number in range(files):
        members = []
        for i, row in list(enumerate(rows))[number * each : (number + 1) * each]:
            if labelled:
                described = {"label_0": row.labels[0], "label_1": row.labels[1]}
                members += [(f"{i:06d}.{place}.jpg", row.images[place]) for place in (0, 1)]
                members += [(f"{i:06d}.json", json.dumps(described).encode())]
            else:
                members += [(f"{i:06d}.winner.jpg", row.winner), (f"{i:06d}.loser.jpg", row.loser)]
            members += [(f"{i:06d}.txt", row.caption.encode())]
        (folder / f"{number:05d}.tar").write_bytes(tar_of(members))
    return folder


def tar_of(members: Sequence[tuple[str | tarfile.TarInfo, bytes]], tar_format: int = tarfile.DEFAULT_FORMAT) -> bytes:
    """A tar file of members, each a name or a whole header, and content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for header, content in members:
            info = tarfile.TarInfo(header) if isinstance(header, str) else header
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def read_all(reader: PairReader) -> tuple[list[Judgement | Tie | Drop], dict[int, PreferencePair | Drop]]:
    """What every row says, and the record of each judgement by its row."""
    said = list(reader.judgements(range(len(reader))))
    rows = [row for row, what in enumerate(said) if isinstance(what, Judgement)]
    return said, dict(zip(rows, pairs(reader, rows), strict=True))


def _write(folder: Path, names: Sequence[str], contents: Sequence[bytes]) -> None:
    for name, content in zip(names, contents, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _write_json(file: Path, value: object) -> Path:
    file.write_text(json.dumps(value))
    return file
