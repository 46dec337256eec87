"""Preference pairs in the schema of Pick-a-Pic v1 and v2 (`yuvalkirstain/pickapic_v2`): parquet, in and out."""

import bisect
import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from flax_pref.data import fields
from flax_pref.data.pairs import Drop, Judgement, Tie
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

_FOOTERS_AT_ONCE = 16  # of files that may lie across a network
_JUDGEMENTS_AT_ONCE, _IMAGES_AT_ONCE = 1024, 4
_ROWS_PER_PAGE = 8  # written at least; a page can only be read as a whole
_BUFFER = 2**20  # bytes of a column that are read at once, not all of a row group


class OpenableFile(Protocol):
    """A file, wherever it is; `str` of it is its name in messages."""

    def open(self, mode: str) -> IO[Any]:
        """Opens it."""
        ...


class PickAPic:
    """Random access to the rows of parquet files of Pick-a-Pic."""

    winner_listed_first = False

    def __init__(self, files: Sequence[OpenableFile]):
        """Reads the footers of the files, which are the set in this order.

        Raises:
            ValueError: a file is no parquet, or lacks a column.
        """
        self.files = tuple(files)
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            groups = list(pool.map(_sizes_of_groups, self.files))
        # The first row of each file and of each row group, and at last the end; the first row group of each file.
        self._file_starts = list(itertools.accumulate(map(sum, groups), initial=0))
        self._starts = list(itertools.accumulate(itertools.chain(*groups), initial=0))
        self._first_groups = list(itertools.accumulate(map(len, groups), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def where(self, row: int) -> tuple[str, int]:
        """See `PairReader`."""
        file = self._file(row)
        return str(self.files[file]), row - self._file_starts[file]

    def judgements(self, rows: range) -> Iterator[Judgement | Tie | Drop]:
        """See `PairReader`."""
        for row in self._records(rows, SAID, _JUDGEMENTS_AT_ONCE):
            yield fields.accepted(_judgement, row)

    def images(self, rows: Sequence[int]) -> Iterator[tuple[bytes, bytes] | Drop]:
        """See `PairReader`."""
        for row in self._records(rows, IMAGES, _IMAGES_AT_ONCE):
            missing = [name for name in IMAGES if row[name] is None]
            yield Drop("image is missing", missing[0]) if missing else (row["jpg_0"], row["jpg_1"])

    def image_files(self, rows: Sequence[int]) -> list[OpenableFile]:
        """See `PairReader`."""
        return [self.files[i] for i in dict.fromkeys(map(self._file, rows))]

    def _records(self, rows: Sequence[int], columns: Sequence[str], at_once: int) -> Iterator[dict[str, Any]]:
        """Those of the columns that there are, of ascending rows; `at_once` of them are in memory, and a page."""
        for file, rows_of_file in itertools.groupby(rows, self._file):
            with _opened(self.files[file]) as parquet:
                there = [name for name in columns if name in parquet.schema_arrow.names]
                for place, rows_of_group in itertools.groupby(rows_of_file, self._group):
                    wanted = [row - self._starts[place] for row in rows_of_group]
                    yield from _rows(parquet, place - self._first_groups[file], wanted, there, at_once)

    def _file(self, row: int) -> int:
        return bisect.bisect_right(self._file_starts, row) - 1

    def _group(self, row: int) -> int:
        """Its place among the row groups of all files."""
        return bisect.bisect_right(self._starts, row) - 1


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


@contextlib.contextmanager
def _opened(file: OpenableFile) -> Iterator[pq.ParquetFile]:
    """The file, and its name on all that goes wrong with it."""
    try:
        with (
            file.open("rb") as opened,
            # Anything else reads whole row groups.
            pq.ParquetFile(opened, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True) as parquet,
        ):
            yield parquet
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: cannot be read as parquet ({reason}); if damaged, download it again") from error


def _sizes_of_groups(file: OpenableFile) -> list[int]:
    """Number of rows of each row group, of a file with the columns of Pick-a-Pic."""
    with _opened(file) as parquet:
        schema = parquet.schema_arrow
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
        return [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]


def _rows(
    parquet: pq.ParquetFile, group: int, wanted: Sequence[int], columns: Sequence[str], at_once: int
) -> Iterator[dict[str, Any]]:
    """Rows of a row group, by their ascending numbers in it."""
    start = done = 0
    for batch in parquet.iter_batches(batch_size=at_once, row_groups=[group], columns=columns):
        end = start + len(batch)
        stop = bisect.bisect_left(wanted, end)
        if done < stop:
            yield from batch.take([row - start for row in wanted[done:stop]]).to_pylist()
        start, done = end, stop
        if done == len(wanted):
            return
    raise pa.ArrowInvalid(f"row group {group} ends after {start} rows, before row {wanted[-1]}")


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
