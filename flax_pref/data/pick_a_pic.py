"""Preference pairs in the schema of Pick-a-Pic v2 (`yuvalkirstain/pickapic_v2`): parquet, in and out."""

import collections
import dataclasses
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from flax_pref.files import replacing

SCHEMA = pa.schema(
    {
        "are_different": pa.bool_(),
        "best_image_uid": pa.string(),
        "caption": pa.string(),
        "created_at": pa.timestamp("ns"),
        "has_label": pa.bool_(),
        "image_0_uid": pa.string(),
        "image_0_url": pa.string(),
        "image_1_uid": pa.string(),
        "image_1_url": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "model_0": pa.string(),
        "model_1": pa.string(),
        "ranking_id": pa.int64(),
        "user_id": pa.int64(),
        "num_example_per_prompt": pa.int64(),
        "__index_level_0__": pa.int64(),
    }
)
READ = ("caption", "jpg_0", "jpg_1", "label_0", "label_1", "are_different", "has_label", "image_0_uid", "image_1_uid")


@dataclasses.dataclass(frozen=True)
class PreferencePair:
    """Two images of one caption; winner and loser are encoded images (JPEG in Pick-a-Pic)."""

    caption: str
    winner: bytes
    loser: bytes
    winner_uid: str
    loser_uid: str


@dataclasses.dataclass(frozen=True)
class LabelledPair:
    """One row to be written; label_0 is 1 if image 0 is preferred, 0 if image 1 is, and 0.5 for a tie."""

    caption: str
    jpg_0: bytes
    jpg_1: bytes
    label_0: float
    image_0_uid: str
    image_1_uid: str
    model_0: str
    model_1: str


class PairReader:
    """Streams the pairs with a preference from parquet files, a few rows at a time.

    `counts` tells after an iteration what became of the rows: `pairs`, and those left out: `ties`, `unlabelled` and
    `identical` (both images are the same).
    """

    def __init__(self, path: str | Path):
        """Takes a parquet file, or a folder whose `*.parquet` are read in the order of their names.

        Raises:
            FileNotFoundError: there is no such file, or none in the folder.
        """
        path = Path(path)
        self.files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not self.files or not self.files[0].is_file():
            raise FileNotFoundError(f"{path}: no parquet file; expected one, or a folder of *.parquet")
        self.counts = collections.Counter()

    def __iter__(self) -> Iterator[PreferencePair]:
        """Yields the pairs.

        Raises:
            ValueError: a file is no parquet, lacks a column, or has a label other than 0, 0.5 and 1.
        """
        self.counts = collections.Counter()
        for file in self.files:
            try:
                parquet = pq.ParquetFile(file)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{file}: not a parquet file ({error})") from error
            with parquet:
                if missing := [name for name in READ if name not in parquet.schema_arrow.names]:
                    raise ValueError(
                        f"{file}: no column {missing[0]!r}; expected the columns of Pick-a-Pic v2: {', '.join(READ)}"
                    )
                number = 0
                for rows in parquet.iter_batches(batch_size=64, columns=list(READ)):
                    for row in rows.to_pylist():
                        if pair := self._pair(row, f"{file}, row {number}"):
                            yield pair
                        number += 1

    def _pair(self, row: dict, where: str) -> PreferencePair | None:
        labels = (row["label_0"], row["label_1"])
        if row["has_label"] is False or None in labels:
            self.counts["unlabelled"] += 1
        elif row["are_different"] is False:
            self.counts["identical"] += 1
        elif labels == (0.5, 0.5):
            self.counts["ties"] += 1
        elif labels in ((1.0, 0.0), (0.0, 1.0)):
            self.counts["pairs"] += 1
            winner, loser = (0, 1) if labels[0] else (1, 0)
            return PreferencePair(
                caption=row["caption"],
                winner=row[f"jpg_{winner}"],
                loser=row[f"jpg_{loser}"],
                winner_uid=row[f"image_{winner}_uid"],
                loser_uid=row[f"image_{loser}_uid"],
            )
        else:
            raise ValueError(f"{where}: labels {labels}; expected (1, 0), (0, 1) or, for a tie, (0.5, 0.5)")
        return None


def write_pairs(file: str | Path, pairs: Iterable[LabelledPair], *, rows_per_group: int = 256) -> None:
    """Writes pairs with all columns of Pick-a-Pic v2; the file appears under its name only when it is complete.

    Raises:
        ValueError: a label is none of 0, 0.5 and 1.
    """
    rows = []
    with replacing(file) as unfinished, pq.ParquetWriter(unfinished, SCHEMA) as writer:
        for index, pair in enumerate(pairs):
            rows.append(_row(index, pair))
            if len(rows) == rows_per_group:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, SCHEMA))


def _row(index: int, pair: LabelledPair) -> dict:
    if pair.label_0 not in (0.0, 0.5, 1.0):
        raise ValueError(f"pair {index}: label_0={pair.label_0}; expected 1 (image 0 is better), 0, or 0.5 for a tie")
    best = {1.0: pair.image_0_uid, 0.0: pair.image_1_uid, 0.5: "tie"}[pair.label_0]
    return dataclasses.asdict(pair) | {
        "label_1": 1.0 - pair.label_0,
        "best_image_uid": best,
        "are_different": pair.image_0_uid != pair.image_1_uid,
        "has_label": True,
        "created_at": 0,
        "image_0_url": "",
        "image_1_url": "",
        "ranking_id": index,
        "user_id": 0,
        "num_example_per_prompt": 1,
        "__index_level_0__": index,
    }


def decode_image(data: bytes, where: str = "image") -> np.ndarray:
    """An encoded image as float32 `[H, W, 3]` in [0, 1].

    Raises:
        ValueError: the bytes are no image; the message begins with `where`.
    """
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) / 255
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{where}: not a complete image of a known format ({len(data)} bytes)") from error


def encode_image(image: np.ndarray) -> bytes:
    """An image `[H, W, 3]` in [0, 1] as JPEG of quality 95 with full colour resolution."""
    buffer = io.BytesIO()
    pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
