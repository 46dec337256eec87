"""Rows of parquet files by their numbers, read where the files are: a few pages in memory, wherever the set lies."""

import bisect
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

JUDGEMENTS_AT_ONCE, IMAGES_AT_ONCE = 1024, 4  # rows

_FOOTERS_AT_ONCE = 16  # of files that may lie across a network
_BUFFER = 2**20  # bytes of a column that are read at once, not all of a row group


class OpenableFile(Protocol):
    """A file, wherever it is; `str` of it is its name in messages."""

    def open(self, mode: str) -> IO[Any]:
        """Opens it."""
        ...


class ParquetRows:
    """Random access to the rows of parquet files of one schema.

    Attributes:
        schema: of the first file.
    """

    def __init__(self, files: Sequence[OpenableFile], check: Callable[[OpenableFile, pa.Schema], None]):
        """Reads the footers of the files, which are the set in this order.

        Args:
            files: at least one.
            check: of each file's schema; raises a ValueError that names the file.

        Raises:
            ValueError: a file is no parquet, or has another schema.
        """

        def footer(file: OpenableFile) -> tuple[pa.Schema, list[int]]:
            with _opened(file) as parquet:
                check(file, parquet.schema_arrow)
                counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
                return parquet.schema_arrow, counts

        self._files = tuple(files)
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            schemas, groups = zip(*pool.map(footer, self._files), strict=True)
        self.schema: pa.Schema = schemas[0]
        # The first row of each file and of each row group, and at last the end; the first row group of each file.
        self._file_starts = list(itertools.accumulate(map(sum, groups), initial=0))
        self._starts = list(itertools.accumulate(itertools.chain(*groups), initial=0))
        self._first_groups = list(itertools.accumulate(map(len, groups), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def where(self, row: int) -> tuple[str, int]:
        """The file that a row is in, and its number in that file, from 0 up."""
        file = self._file(row)
        return str(self._files[file]), row - self._file_starts[file]

    def files_of(self, rows: Sequence[int]) -> list[OpenableFile]:
        """The files that hold the rows, each once."""
        return [self._files[i] for i in dict.fromkeys(map(self._file, rows))]

    def records(self, rows: Sequence[int], columns: Sequence[str], at_once: int) -> Iterator[dict[str, Any]]:
        """Those of the columns that there are, of ascending rows; `at_once` of them are in memory, and a page.

        Raises:
            ValueError: a file is damaged; names it.
        """
        for file, rows_of_file in itertools.groupby(rows, self._file):
            with _opened(self._files[file]) as parquet:
                there = [name for name in columns if name in parquet.schema_arrow.names]
                for place, rows_of_group in itertools.groupby(rows_of_file, self._group):
                    wanted = [row - self._starts[place] for row in rows_of_group]
                    yield from _rows(parquet, place - self._first_groups[file], wanted, there, at_once)

    def _file(self, row: int) -> int:
        return bisect.bisect_right(self._file_starts, row) - 1

    def _group(self, row: int) -> int:
        """Its place among the row groups of all files."""
        return bisect.bisect_right(self._starts, row) - 1


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
