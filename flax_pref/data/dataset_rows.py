"""Rows of whatever `datasets` loads: parquet where it lies, Arrow files by memory map, anything else as a stream.

`datasets` is imported here alone, and only when a set is opened. It decides which files a config and a split have, and
converts formats. Parquet files are read with `ParquetRows` instead: without a copy in the cache, with page checksums,
and by row across a network.
"""

import contextlib
import itertools
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from etils import epath
from huggingface_hub import HfFileSystem, constants

from flax_pref.checkpoints.hub import HUB_ID
from flax_pref.data.column_set import ImageFiles, Record, Rows, check_schema, outer_columns
from flax_pref.data.columns import Columns
from flax_pref.data.hub_files import PREFIX, HubFile
from flax_pref.data.parquet_rows import JUDGEMENTS_AT_ONCE, ParquetRows
from flax_pref.files import read_json

if TYPE_CHECKING:
    import datasets

_SAVED, _SAVED_SPLITS, _INFO = "state.json", "dataset_dict.json", "dataset_info.json"  # that `save_to_disk` writes
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
_STREAMED_AT_ONCE = 16  # rows, with their images


class Loaded(NamedTuple):
    """A set that is open.

    Attributes:
        rows: of its table.
        images: where paths in it lead.
        class_names: of the columns that hold numbers of classes.
    """

    rows: Rows
    images: ImageFiles
    class_names: dict[str, list[str]]


def load(
    path: str,
    *,
    split: str,
    name: str | None,
    revision: str | None,
    files: Sequence[str],
    stream: bool,
    columns: Columns,
) -> Loaded:
    """Opens one split of a set.

    Args:
        path: folder, file or Hub id.
        split: its name.
        name: of the configuration of the set, where it has several.
        revision: of the Hub repository: a commit, branch or tag.
        files: patterns of the files of the split, relative to the path; empty: those that `datasets` finds.
        stream: whether to read files where they are, rather than to download and convert all first.
        columns: that are read.

    Raises:
        FileNotFoundError: there is no such set, configuration or split, or it cannot be reached.
        ValueError: a file is damaged, or there are no such columns.
    """
    if "://" in path:
        raise ValueError(f"{path}: layout datasets reads local folders and Hub ids; mount the bucket, or copy the set")
    local = Path(path).expanduser()
    if local.is_file():
        if files:
            raise ValueError(f"{path}: is a file, and source.files names others; give its folder")
        local, files = local.parent, (local.name,)
    if not local.exists() and not HUB_ID.fullmatch(path):
        raise FileNotFoundError(f"{path}: no such file or folder, and not the id of a dataset of the Hub (owner/name)")
    if local.exists() and revision is not None:
        raise ValueError(f"{path}: is a local folder, which has no revision {revision!r}; leave source.revision out")
    if (local / _SAVED).is_file() or (local / _SAVED_SPLITS).is_file():
        for setting, value in (("name", name), ("files", files)):
            if value:
                raise ValueError(f"{path}: was written by save_to_disk, which has no {setting}; leave it out")
        return _saved(local.resolve(), split, columns)
    return _built(local.resolve() if local.exists() else None, path, split, name, revision, files, stream, columns)


def _datasets() -> "Any":
    """The library, which does not import torch."""
    import datasets
    from datasets import config

    if "torch" not in sys.modules:
        # Streams would be subclasses of torch's otherwise, wherever torch is installed.
        config.TORCH_AVAILABLE = False
    return datasets


class _KeptLog(logging.Handler):
    """Keeps what libraries log, until it is known whether an error comes of it."""

    def __init__(self):
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def file(self) -> str | None:
        """The file that an error is in: the log alone has its name."""
        found = (re.search(r"file '([^']+)'", record.getMessage()) for record in reversed(self.records))
        return next((match[1] for match in found if match), None)


@contextlib.contextmanager
def _told(where: object) -> Iterator[None]:
    """Makes an error of `datasets` one line, with what its log says of it."""
    kept = _KeptLog()
    handlers: dict[logging.Logger, list[logging.Handler]] = {}
    for name in ("datasets", "huggingface_hub"):
        log = logging.getLogger(name)
        handlers[log], log.handlers = log.handlers, [kept]
    try:
        yield
        for record in kept.records:
            for handler in handlers[logging.getLogger(record.name.partition(".")[0])]:
                handler.handle(record)
    except Exception as error:  # its own, those of Arrow, of parsers and of HTTP clients
        reason = " ".join(f"{error.__cause__ or error}".split()) or type(error).__name__
        if isinstance(error, ConnectionError) or "find cache" in reason:
            raise FileNotFoundError(
                f"{where}: no such file or folder, and the Hub cannot be reached ({reason}); connect to the network, "
                "or download the set and give the path of its folder"
            ) from error
        if isinstance(error, FileNotFoundError):
            login = "; a private one needs a login (hf auth login)" if "on the Hub" in reason else ""
            raise FileNotFoundError(f"{where}: datasets finds no such set or files ({reason}){login}") from error
        if "scripts are no longer supported" in reason:
            raise ValueError(
                f"{where}: is made by a script, which datasets no longer runs; download the repository and name its "
                "data files with --source.files"
            ) from error
        if "Config name is missing" in reason or "BuilderConfig" in reason:
            raise ValueError(f"{where}: {reason}: choose with --source.name") from error
        raise ValueError(
            f"{kept.file or where}: datasets cannot read it ({reason:.500}); if damaged, write or download it again"
        ) from error
    finally:
        for log, its_handlers in handlers.items():
            log.handlers = its_handlers


def _saved(folder: Path, split: str, columns: Columns) -> Loaded:
    """A set that `save_to_disk` wrote, with or without splits."""
    datasets = _datasets()
    where = folder
    if (folder / _SAVED_SPLITS).is_file():
        there = sorted(file.parent.name for file in folder.glob(f"*/{_SAVED}"))
        _check_split(folder, split, there)
        where = folder / split
    try:
        with _told(where):
            table = datasets.load_from_disk(str(where))
    except ValueError as error:
        if (odd := _odd_column(where)) is None:
            raise
        raise ValueError(f"{odd}: the set was changed after it was written, or is damaged; write it again") from error
    rows = ArrowRows(table, str(where), columns)
    return Loaded(rows, ImageFiles(epath.Path(folder)), _class_names(table.features))


def _odd_column(where: Path) -> str | None:
    """The file and the column of a set of `save_to_disk` that are not as its description has them; None: no such."""
    try:
        features = _datasets().DatasetInfo.from_directory(str(where)).features.arrow_schema
        for entry in read_json(where / _SAVED, expected="the state of a set of save_to_disk")["_data_files"]:
            file = where / entry["filename"]
            with pa.memory_map(str(file)) as source:
                schema = pa.ipc.open_stream(source).schema
            for name in features.names:
                if name not in schema.names:
                    return f"{file}: no column {name!r}, which {_INFO} has"
            for name in schema.names:
                if name not in features.names:
                    return f"{file}: column {name!r} is not in {_INFO}"
                if (kind := schema.field(name).type) != (expected := features.field(name).type):
                    return (
                        f"{file}: column {name!r} is of type {kind!s:.80}, expected {expected!s:.80} as {_INFO} has it"
                    )
    except (ValueError, OSError, LookupError, TypeError, AttributeError):
        return None
    return None


def _built(
    folder: Path | None,
    path: str,
    split: str,
    name: str | None,
    revision: str | None,
    files: Sequence[str],
    stream: bool,
    columns: Columns,
) -> Loaded:
    """A set in any format that `datasets` has a builder for."""
    datasets = _datasets()
    place: dict[str, Any] = {
        # With a last part of "." nothing there is taken for a script of the folder's name.
        "path": path if folder is None else f"{folder}/.",
        "name": name,
        "revision": revision,
        "data_files": {split: list(files)} if files else None,
    }
    with _told(path):
        builder = datasets.load_dataset_builder(**place)
        if hasattr(builder.config, "on_mixed_types"):
            # Where one value of a column is of another type, all of its file would become JSON: "a cat" with its
            # quotes. It is an argument, since what it changes must not come from the cache.
            builder = datasets.load_dataset_builder(**place, on_mixed_types="refuse")
    files_of_splits = {str(there): urls for there, urls in (builder.config.data_files or {}).items()}
    _check_split(path, split, list(files_of_splits or builder.info.splits or ()))
    urls = [str(url) for url in files_of_splits.get(split, ())]
    set_of = f"{path}, split {split}"
    if folder is None:
        root = str(builder.base_path or "").rstrip("/").removeprefix(PREFIX)
        # Images that were downloaded, and those of archives that were extracted.
        caches = epath.Path(constants.HF_HUB_CACHE), epath.Path(datasets.config.HF_DATASETS_CACHE)
        images = ImageFiles(HubFile(HfFileSystem(), root or f"datasets/{path}"), caches)
    else:
        images = ImageFiles(epath.Path(folder))
    if urls and all(url.endswith(".parquet") for url in urls) and (stream or folder is not None):
        rows = ParquetRows([_file(url) for url in urls], lambda file, schema: check_schema(schema, columns, file))
        features = builder.info.features or datasets.Features.from_arrow_schema(rows.schema)
    elif stream:
        with _told(set_of):
            streamed = builder.as_streaming_dataset(split=split)
        rows = StreamedRows(streamed, set_of, [_file(url) for url in urls], columns)
        features = streamed.features or {}
    else:
        with _told(path):
            builder.download_and_prepare()
            table = builder.as_dataset(split=split)
        rows = ArrowRows(table, set_of, columns)
        features = table.features
    return Loaded(rows, images, _class_names(features))


def _check_split(where: object, split: str, there: Sequence[str]) -> None:
    if split not in there:
        raise FileNotFoundError(
            f"{where}: no split {split!r}; there are {', '.join(there) or 'none'}: choose with --source.split"
        )


def _file(url: str) -> epath.Path | HubFile:
    return HubFile(HfFileSystem(), url.removeprefix(PREFIX)) if url.startswith(PREFIX) else epath.Path(url)


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the classes of each column of class labels."""
    return {
        column: list(feature.names)
        for column, feature in features.items()
        if type(feature).__name__ == "ClassLabel" and feature.names is not None
    }


class ArrowRows:
    """Random access to a `datasets.Dataset`, whose Arrow files are mapped into memory.

    Attributes:
        schema: of its table.
    """

    def __init__(self, dataset: "datasets.Dataset", where: str, columns: Columns):
        """Keeps the set, after a look at where its values begin and end: Arrow would read beyond a damaged file.

        Raises:
            ValueError: it lacks one of the columns, or is damaged.
        """
        self.schema: pa.Schema = dataset.features.arrow_schema
        check_schema(self.schema, columns, where)
        with _told(where):
            dataset.select_columns(outer_columns(self.schema, columns)).data.validate(full=True)
        self._where, self._dataset = where, dataset.with_format("arrow")
        self._files = [epath.Path(file["filename"]) for file in dataset.cache_files]

    def __len__(self) -> int:
        return len(self._dataset)

    def where(self, row: int) -> tuple[str, int]:
        """See `Rows`."""
        return self._where, row

    def files_of(self, rows: Sequence[int]) -> list[epath.Path]:
        """See `Rows`: all of them, for rows may have been shuffled."""
        return list(self._files) if len(rows) else []

    def records(self, rows: Sequence[int], columns: Sequence[str], at_once: int) -> Iterator[Record]:
        """See `Rows`."""
        some = None
        for start in range(0, len(rows), at_once):
            with _told(self._where):
                some = self._dataset.select_columns(list(columns)) if some is None else some
                found: Any = some[[int(row) for row in rows[start : start + at_once]]]  # a table, in this format
                records = found.to_pylist()
            yield from records


class StreamedRows:
    """Rows of a `datasets.IterableDataset`: what they say is kept in memory, their images are read where they are.

    Images come in the order of the files. To go back, a file is read from its start; the others are not touched.

    Attributes:
        schema: of its table.
    """

    def __init__(
        self, dataset: "datasets.IterableDataset", where: str, files: Sequence[epath.Path | HubFile], columns: Columns
    ):
        """Reads all that is no image.

        Args:
            dataset: to be read.
            where: its name in messages.
            files: that it is read from.
            columns: that are asked for.

        Raises:
            ValueError: a file is damaged, or lacks one of the columns.
        """
        # A folder of images has these among its files; each row names its own.
        self._files = [file for file in files if not file.name.lower().endswith(_IMAGES)]
        self._where, self._dataset = where, dataset.with_format("arrow")
        self._parts, asked = dataset.num_shards, None
        if dataset.features is not None:
            self.schema: pa.Schema = dataset.features.arrow_schema
            check_schema(self.schema, columns, where)
            names = outer_columns(self.schema, columns)
            asked = [name for name in names if not _holds_bytes(self.schema.field(name).type)]
        said, counts = [], []
        for part in range(self._parts):
            tables = list(self._tables(part, asked, JUDGEMENTS_AT_ONCE))
            counts.append(sum(table.num_rows for table in tables))
            said += tables
        with _told(where):
            self._said = pa.concat_tables(said, promote_options="permissive") if said else pa.table({})
        if asked is None:  # formats without a schema, which hold no bytes
            self.schema = self._said.schema
            check_schema(self.schema, columns, where)
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._open: tuple[int, tuple[str, ...], int, Iterator[Record]] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, row: int) -> tuple[str, int]:
        """See `Rows`."""
        part = self._part(row)
        if len(self._files) == self._parts:
            return str(self._files[part]), row - int(self._starts[part])
        return self._where, row

    def files_of(self, rows: Sequence[int]) -> list[epath.Path | HubFile]:
        """See `Rows`."""
        if len(self._files) == self._parts:
            return [self._files[part] for part in dict.fromkeys(map(self._part, rows))]
        return list(self._files) if len(rows) else []

    def records(self, rows: Sequence[int], columns: Sequence[str], at_once: int) -> Iterator[Record]:
        """See `Rows`."""
        if set(columns) <= set(self._said.column_names):
            said = self._said.select(list(columns))
            for start in range(0, len(rows), at_once):
                yield from said.take([int(row) for row in rows[start : start + at_once]]).to_pylist()
            return
        for part, rows_of_part in itertools.groupby(rows, self._part):
            for row in rows_of_part:
                yield self._streamed(part, row - int(self._starts[part]), tuple(columns))

    def _streamed(self, part: int, number: int, columns: tuple[str, ...]) -> Record:
        """A row of a file; reads on from the one before it, if that was asked for last."""
        at = self._open
        if at is None or at[:2] != (part, columns) or at[2] > number:
            tables = self._tables(part, columns, _STREAMED_AT_ONCE)
            at = part, columns, 0, (record for table in tables for record in _records(table))
        skipped = number - at[2]
        record = next(itertools.islice(at[3], skipped, None), None)
        if record is None:
            raise ValueError(f"{self._where}: ends before row {number} of its file {part}; it has changed")
        self._open = (part, columns, number + 1, at[3])
        return record

    def _tables(self, part: int, columns: Sequence[str] | None, at_once: int) -> Iterator[pa.Table]:
        with _told(self._where):
            stream = self._dataset.shard(self._parts, part)
            batches = iter((stream if columns is None else stream.select_columns(list(columns))).iter(at_once))
        while True:
            with _told(self._where):
                table: Any = next(batches, None)  # a table, in this format
                if table is None:
                    return
                table.validate(full=True)
            yield table

    def _part(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, "right")) - 1


def _records(table: pa.Table) -> Iterator[Record]:
    """Rows one by one, so that a batch is not in memory twice."""
    for row in range(table.num_rows):
        yield table.slice(row, 1).to_pylist()[0]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
