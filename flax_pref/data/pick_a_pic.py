"""Preference pairs in the schema of Pick-a-Pic v1 and v2 (`yuvalkirstain/pickapic_v2`): parquet, in and out."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flax_pref.data import fields
from flax_pref.data.pairs import Drop, Judgement, Tie
from flax_pref.data.parquet_rows import IMAGES_AT_ONCE, JUDGEMENTS_AT_ONCE, OpenableFile, ParquetRows
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
IMAGES = ("jpg_0", "jpg_1")
READ = ("caption", *IMAGES, "label_0", "label_1", "are_different", "has_label", "image_0_uid", "image_1_uid")
SAID = (*(name for name in READ if name not in IMAGES), "model_0", "model_1")

# Of each column: what it should hold, and the types that are read. Truth values come as numbers and texts, too.
_BINARY = ("binary, the bytes of a JPEG", (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))
_TEXT = ("texts", (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
_NUMBER = ("numbers", (pa.types.is_integer, pa.types.is_floating))
_TYPES = {
    **dict.fromkeys(IMAGES, _BINARY),
    **dict.fromkeys(("label_0", "label_1"), _NUMBER),
    **dict.fromkeys(("has_label", "are_different"), ("truth values", (pa.types.is_boolean, *_NUMBER[1], *_TEXT[1]))),
    **dict.fromkeys(("image_0_uid", "image_1_uid"), ("texts or numbers", (*_TEXT[1], pa.types.is_integer))),
    **dict.fromkeys(("caption", "model_0", "model_1"), _TEXT),
}

_ROWS_PER_PAGE = 8  # written at least; a page can only be read as a whole


class PickAPic:
    """Random access to the rows of parquet files of Pick-a-Pic."""

    winner_listed_first = False
    image_names = IMAGES

    def __init__(self, files: Sequence[OpenableFile]):
        """Reads the footers of the files, which are the set in this order.

        Raises:
            ValueError: a file is no parquet, or lacks a column.
        """
        self._rows = ParquetRows(files, _check_schema)

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, row: int) -> tuple[str, int]:
        """See `PairReader`."""
        return self._rows.where(row)

    def judgements(self, rows: range) -> Iterator[Judgement | Tie | Drop]:
        """See `PairReader`."""
        for row in self._rows.records(rows, SAID, JUDGEMENTS_AT_ONCE):
            yield fields.accepted(_judgement, row)

    def images(self, rows: Sequence[int]) -> Iterator[tuple[bytes, bytes] | Drop]:
        """See `PairReader`."""
        for row in self._rows.records(rows, IMAGES, IMAGES_AT_ONCE):
            missing = [name for name in IMAGES if row[name] is None]
            yield Drop("image is missing", missing[0]) if missing else (row["jpg_0"], row["jpg_1"])

    def image_files(self, rows: Sequence[int]) -> list[OpenableFile]:
        """See `PairReader`."""
        return self._rows.files_of(rows)


def _judgement(row: dict[str, Any]) -> Judgement | Tie:
    if fields.truth(row["has_label"], "has_label") is False:
        raise fields.Rejected("no label", damaged=False)
    if fields.truth(row["are_different"], "are_different") is False:
        raise fields.Rejected("both images are the same", damaged=False)
    winner = fields.preferred((row["label_0"], row["label_1"]))
    if isinstance(winner, Tie):
        return winner
    return Judgement(
        caption=fields.caption(row["caption"]),
        winner=winner,
        ids=(
            fields.identifier(row["image_0_uid"], "image_0_uid"),
            fields.identifier(row["image_1_uid"], "image_1_uid"),
        ),
        models=fields.two_models(row.get("model_0"), row.get("model_1")),
    )


def _check_schema(file: OpenableFile, schema: pa.Schema) -> None:
    """That a file has the columns of Pick-a-Pic."""
    missing = [name for name in READ if name not in schema.names]
    if missing and set(missing) <= set(IMAGES):
        raise ValueError(
            f"{file}: no column {missing[0]!r}: this is the copy without images (pickapic_v2_no_images); get the "
            "one with images, yuvalkirstain/pickapic_v2"
        )
    if missing:
        raise ValueError(f"{file}: no column {missing[0]!r}; Pick-a-Pic has {', '.join(READ)}")
    if twice := [name for name in _TYPES if schema.names.count(name) > 1]:
        raise ValueError(f"{file}: column {twice[0]!r} is there twice; expected each once")
    for name, (expected, allowed) in _TYPES.items():
        kind = schema.field(name).type if name in schema.names else pa.null()
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(is_kind(kind) for is_kind in (*allowed, pa.types.is_null)):
            raise ValueError(f"{file}: column {name!r} is of type {kind}; expected {expected}")


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


def write_pairs(file: str | Path, pairs: Iterable[LabelledPair], *, rows_per_group: int = 256) -> None:
    """Writes pairs with all columns of Pick-a-Pic v2; the file appears under its name only when it is complete.

    Raises:
        ValueError: a label is none of 0, 0.5 and 1.
    """
    rows = []
    how = {"write_batch_size": _ROWS_PER_PAGE, "write_page_checksum": True}
    with replacing(file) as unfinished, pq.ParquetWriter(unfinished, SCHEMA, **how) as writer:
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
