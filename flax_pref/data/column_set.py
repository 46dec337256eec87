"""Preference pairs in tables of any schema, whose columns the config names."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from etils import epath

from flax_pref.data import fields
from flax_pref.data.columns import Columns
from flax_pref.data.fields import Rejected
from flax_pref.data.hub_files import HubFile
from flax_pref.data.images import MOST_BYTES
from flax_pref.data.json_rows import read_image
from flax_pref.data.pairs import Drop, Judgement, Tie, combination, combinations
from flax_pref.data.parquet_rows import IMAGES_AT_ONCE, JUDGEMENTS_AT_ONCE

Record = dict[str, Any]
Kind = Callable[[pa.DataType], bool]

_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_NUMBER = (pa.types.is_integer, pa.types.is_floating)
_LIST = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def _is_image(kind: pa.DataType) -> bool:
    """What `datasets` stores as an image is a struct of bytes and a path."""
    if pa.types.is_struct(kind):
        return {"bytes", "path"} == {kind.field(i).name for i in range(kind.num_fields)}
    return _is_any(kind, (*_TEXT, *_BINARY))


def _is_any(kind: pa.DataType, kinds: Sequence[Kind]) -> bool:
    return any(is_kind(kind) for is_kind in kinds)


# Of each field of `Columns`: what its columns should hold, and the types that are read.
_EXPECTED: dict[str, tuple[str, Sequence[Kind]]] = {
    "caption": ("texts", _TEXT),
    "winner": ("images: structs of bytes and path, bytes, or paths", (_is_image,)),
    "label": ("texts, numbers or truth values", (*_TEXT, *_NUMBER, pa.types.is_boolean)),
    "scores": ("numbers", _NUMBER),
    "group": ("texts or whole numbers", (*_TEXT, pa.types.is_integer)),
    "required": ("truth values", (*_TEXT, *_NUMBER, pa.types.is_boolean)),
    "models": ("texts", _TEXT),
    "confidence": ("numbers", _NUMBER),
}
_EXPECTED |= {"loser": _EXPECTED["winner"], "images": _EXPECTED["winner"]}
_EXPECTED |= {"ids": _EXPECTED["group"], "margin": _EXPECTED["confidence"]}
_OF_EACH_IMAGE = ("images", "scores", "ids", "models")  # lists, where images is one column of lists


class Rows(Protocol):
    """Random access to the rows of a table.

    Attributes:
        schema: of the table.
    """

    schema: pa.Schema

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def where(self, row: int) -> tuple[str, int]:
        """The file or set that a row is in, and its number in it."""
        ...

    def files_of(self, rows: Sequence[int]) -> list[Any]:
        """The files that hold the rows, each once: `str` of one is its name."""
        ...

    def records(self, rows: Sequence[int], columns: Sequence[str], at_once: int) -> Iterator[Record]:
        """Those of the columns, of ascending rows; at most about `at_once` of them are in memory."""
        ...


class ImageFiles(NamedTuple):
    """Where the images are that a set names by paths.

    Attributes:
        folder: of the set, where relative paths begin: local, or on the Hub.
        caches: folders that absolute paths may lead to as well.
    """

    folder: epath.Path | HubFile
    caches: tuple[epath.Path, ...] = ()

    def file(self, path: str, column: str) -> tuple[epath.Path, str] | HubFile:
        """A file of a local folder, or one on the Hub.

        Raises:
            Rejected: it is outside the set.
        """
        if isinstance(self.folder, HubFile):
            if path.startswith(f"{self.folder}/"):
                path = path[len(f"{self.folder}/") :]
            if not path.startswith("/"):
                return self.folder._replace(path=f"{self.folder.path}/{fields.relative_path(path, column)}")
        folders = (*(() if isinstance(self.folder, HubFile) else (self.folder,)), *self.caches)
        for folder in folders:
            if path.startswith(f"{folder}/"):
                return folder, fields.relative_path(path[len(f"{folder}/") :], column)
        if isinstance(self.folder, HubFile):
            raise Rejected("path leaves the folder of the set", f"{column}: {fields.quote(path)}")
        return self.folder, fields.relative_path(path, column)

    def read(self, path: str, column: str) -> bytes:
        """The encoded image.

        Raises:
            Rejected: it is outside the set, or cannot be read.
        """
        file = self.file(path, column)
        with _named(column):
            if not isinstance(file, HubFile):
                return read_image(*file)
            try:
                with file.open("rb") as opened:
                    data = opened.read(MOST_BYTES + 1)
            except FileNotFoundError as error:
                raise Rejected("image is missing", str(file)) from error
            except OSError as error:
                raise Rejected("image cannot be read", f"{file}: {error.strerror or error}") from error
            return _of_limited_size(data, str(file))


def _of_limited_size(data: bytes, name: str) -> bytes:
    if len(data) > MOST_BYTES:
        raise Rejected("image is too large", f"{name}: more than {MOST_BYTES} bytes")
    return data


class _Pair(NamedTuple):
    """Two images of the set: two columns of a record, two elements of its lists, or two records of a group."""

    records: tuple[Record, Record]  # the same one, unless they are of a group
    rows: tuple[int, int]  # of these records
    places: tuple[int, int]  # among the columns, or in the lists


class ColumnSet:
    """Random access to the pairs of a table.

    Where images come in lists or groups, every two of them are a row here: the first with the second, the first with
    the third and so on; groups are in the order of their first images. A list or group that makes no pair is one row.
    """

    def __init__(self, rows: Rows, columns: Columns, images: ImageFiles, class_names: Mapping[str, Sequence[str]]):
        """Reads as much of the table as tells how many pairs it has.

        Args:
            rows: of the table, whose schema `check_schema` has seen.
            columns: of the pairs.
            images: where paths lead.
            class_names: of the columns that hold numbers of classes.

        Raises:
            ValueError: a file is damaged; names it.
        """
        self._rows, self._columns, self._images, self._class_names = rows, columns, images, class_names
        self._form = columns.form
        self.winner_listed_first = self._form == "roles"
        self.image_names = columns.of_images[0], columns.of_images[-1]
        self._places = {name: _place(rows.schema, name) or (name,) for _, name in named_columns(columns)}
        self._has_paths = all(_is_path(_type(rows.schema, self._places[name])) for name in columns.of_images)
        self._said = tuple(
            dict.fromkeys(
                name
                for field, name in named_columns(columns)
                if field not in ("winner", "loser", "images") or self._has_paths
            )
        )
        # The records of each unit, of which its pairs are made, and the first pair of each; at last the end.
        self._members: list[np.ndarray] | None = None
        self._starts: np.ndarray | None = None
        if self._form in ("list", "group"):
            self._starts = np.concatenate([[0], np.cumsum(self._count_pairs(), dtype=np.int64)])
        self._keeps_files = self._has_paths or self._are_all_outside()

    def __len__(self) -> int:
        return len(self._rows) if self._starts is None else int(self._starts[-1])

    def where(self, row: int) -> tuple[str, int]:
        """See `PairReader`; of a list or group of images the place of its first."""
        return self._rows.where(self._records_of(self._unit(row))[0])

    def judgements(self, rows: range) -> Iterator[Judgement | Tie | Drop]:
        """See `PairReader`."""
        for pair in self._pairs(rows, self._said, JUDGEMENTS_AT_ONCE):
            yield pair if isinstance(pair, Drop) else fields.accepted(self._judgement, pair)

    def images(self, rows: Sequence[int]) -> Iterator[tuple[bytes, bytes] | Drop]:
        """See `PairReader`."""
        columns = dict.fromkeys((*self._columns.of_images, *self._columns.scores))
        for pair in self._pairs(rows, tuple(columns), IMAGES_AT_ONCE):
            yield pair if isinstance(pair, Drop) else fields.accepted(self._two_images, pair)

    def image_files(self, rows: Sequence[int]) -> list[Any]:
        """See `PairReader`."""
        records = list(dict.fromkeys(record for row in rows for record in self._records_of(self._unit(row))))
        files = self._rows.files_of(sorted(records))
        if self._keeps_files:
            columns = dict.fromkeys((*self._columns.of_images, *self._columns.scores))
            pairs = self._pairs(rows, tuple(columns), JUDGEMENTS_AT_ONCE)
            found = (fields.accepted(self._two_files, pair) for pair in pairs if not isinstance(pair, Drop))
            files += dict.fromkeys(itertools.chain.from_iterable(two for two in found if not isinstance(two, Drop)))
        return files

    def _records(self, rows: Sequence[int], columns: Sequence[str], at_once: int) -> Iterator[Record]:
        """Those of the columns by their names, also where they are within others."""
        places = {name: self._places[name] for name in columns}
        records = self._rows.records(rows, list(dict.fromkeys(place[0] for place in places.values())), at_once)
        if all(len(place) == 1 for place in places.values()):
            return records
        return ({name: _inner(record, place) for name, place in places.items()} for record in records)

    # Which records make a row

    def _unit(self, row: int) -> int:
        return row if self._starts is None else int(np.searchsorted(self._starts, row, "right")) - 1

    def _records_of(self, unit: int) -> Sequence[int]:
        return (unit,) if self._members is None else self._members[unit].tolist()

    def _count_pairs(self) -> list[int]:
        """Rows that each list or group makes, at least one."""
        every = range(len(self._rows))
        if self._columns.group is None:
            (name,) = self._columns.scores
            records = self._records(every, [name], JUDGEMENTS_AT_ONCE)
            return [max(1, combinations(len(record[name] or ()))) for record in records]
        group, members = self._columns.group, {}
        for row, record in enumerate(self._records(every, [group], JUDGEMENTS_AT_ONCE)):
            key = record[group]
            members.setdefault((key,) if key is not None else row, []).append(row)  # without one, it is alone
        self._members = [np.array(rows, np.int64) for rows in members.values()]
        return [max(1, combinations(len(rows))) for rows in self._members]

    def _pairs(self, rows: Sequence[int], columns: Sequence[str], at_once: int) -> Iterator[_Pair | Drop]:
        """What each row is made of, in order."""
        if self._members is None:
            units = [unit for unit, _ in itertools.groupby(rows, self._unit)]
            records = self._records(units, columns, at_once)
            for (unit, its_rows), record in zip(itertools.groupby(rows, self._unit), records, strict=True):
                for row in its_rows:
                    yield fields.accepted(self._pair, row, (unit,), {unit: record})
            return
        # Members of a group may be anywhere: some groups are read together, but the images of one at a time.
        together = JUDGEMENTS_AT_ONCE if at_once == JUDGEMENTS_AT_ONCE else 1
        units = [unit for unit, _ in itertools.groupby(rows, self._unit)]
        asked = itertools.groupby(rows, self._unit)
        for start in range(0, len(units), together):
            some = units[start : start + together]
            members = sorted(itertools.chain.from_iterable(map(self._records_of, some)))
            records = dict(zip(members, self._records(members, columns, at_once), strict=True))
            for unit, its_rows in itertools.islice(asked, len(some)):
                for row in its_rows:
                    yield fields.accepted(self._pair, row, self._records_of(unit), records)

    def _pair(self, row: int, members: Sequence[int], records: Mapping[int, Record]) -> _Pair:
        first = members[0]
        if self._starts is None:
            return _Pair((records[first], records[first]), (first, first), (0, 1))
        number = int(row - self._starts[self._unit(row)])
        if self._members is None:
            (name,) = self._columns.scores
            scores = records[first][name]
            if scores is None or len(scores) < 2:
                raise _without_pair(len(scores or ()), f"{name}: {fields.quote(scores)}")
            return _Pair((records[first], records[first]), (first, first), combination(len(scores), number))
        if len(members) < 2:
            raise _without_pair(
                1, f"{self._columns.group}: {fields.quote(records[first].get(self._columns.group or ''))}"
            )
        i, j = combination(len(members), number)
        return _Pair((records[members[i]], records[members[j]]), (members[i], members[j]), (i, j))

    # What a pair says

    def _judgement(self, pair: _Pair) -> Judgement | Tie:
        columns, record = self._columns, pair.records[0]
        for name in columns.required:
            if any(fields.truth(each[name], name) is False for each in pair.records):
                raise Rejected(f"{name} is false", damaged=False)
        winner, margin = self._winner(pair)
        if isinstance(winner, Tie):
            return winner
        with _named(columns.caption):
            caption = fields.caption(record[columns.caption])
            if pair.records[1] is not record and (other := fields.caption(pair.records[1][columns.caption])) != caption:
                raise Rejected("captions of a group differ", fields.quote([caption, other]))
        ids = self._ids(pair)
        models = self._of_each(pair, columns.models)
        if columns.margin is not None:
            with _named(columns.margin):
                margin = fields.number(record[columns.margin], "margin")
        confidence = None
        if columns.confidence is not None:
            with _named(columns.confidence):
                confidence = fields.confidence(record[columns.confidence])
        return Judgement(caption, winner, ids, confidence, margin, models and fields.two_models(*models))

    def _winner(self, pair: _Pair) -> tuple[int | Tie, float | None]:
        """Which image is preferred, and by how much."""
        columns = self._columns
        if self._form == "roles":
            return 0, None
        if columns.label is not None:
            return self._labelled(pair.records[0][columns.label]), None
        values = self._of_each(pair, columns.scores)
        assert values is not None
        scores = []
        for name, value in zip((columns.scores[0], columns.scores[-1]), values, strict=True):
            with _named(name):
                scores.append(fields.finite(value, "score"))
        first, second = scores
        if first == second:
            return Tie(), None
        return int((second < first) == columns.lower_wins), abs(first - second)

    def _labelled(self, value: Any) -> int | Tie:
        columns, name = self._columns, self._columns.label
        assert name is not None
        if value is None:
            raise Rejected("no label", name, damaged=False)
        names = self._class_names.get(name)
        if names is not None and isinstance(value, int):
            if value == -1:  # as `datasets` writes that there is none
                raise Rejected("no label", name, damaged=False)
            text = names[value] if 0 <= value < len(names) else str(value)
        else:
            text = _as_text(value)
        for which, values in ((0, columns.first), (1, columns.second), (Tie(), columns.ties)):
            if text in values:
                return which
        expected = ", ".join((*columns.first, *columns.second, *columns.ties))
        raise Rejected("labels mean nothing", f"{name}: {fields.quote(text)}; expected one of {expected}")

    def _ids(self, pair: _Pair) -> tuple[str, str]:
        columns = self._columns
        if columns.ids:
            found = self._of_each(pair, columns.ids)
            assert found is not None
            names = columns.ids[0], columns.ids[-1]
            return fields.identifier(found[0], names[0]), fields.identifier(found[1], names[1])
        if self._has_paths:
            values = self._of_each(pair, columns.of_images)
            assert values is not None
            return fields.two_paths(*values, self._names(pair))
        if self._form == "group":
            return str(pair.rows[0]), str(pair.rows[1])
        return f"{pair.rows[0]}-{pair.places[0]}", f"{pair.rows[1]}-{pair.places[1]}"

    def _of_each(self, pair: _Pair, names: Sequence[str]) -> tuple[Any, Any] | None:
        """What columns hold of the two images; None if there are none."""
        if not names:
            return None
        first, second = (record[name] for record, name in zip(pair.records, (names[0], names[-1]), strict=True))
        if self._form != "list":
            return first, second
        (scores,) = self._columns.scores
        if first is None or len(first) != len(pair.records[0][scores]):
            raise Rejected(
                f"{names[0]} are not as many as {scores}", f"{len(first or ())} and {len(pair.records[0][scores])}"
            )
        return first[pair.places[0]], first[pair.places[1]]

    # Its images

    def _names(self, pair: _Pair) -> tuple[str, str]:
        if self._form == "list":
            return f"{self.image_names[0]}[{pair.places[0]}]", f"{self.image_names[1]}[{pair.places[1]}]"
        return self.image_names

    def _two_images(self, pair: _Pair) -> tuple[bytes, bytes]:
        values = self._of_each(pair, self._columns.of_images)
        assert values is not None
        first, second = map(self._encoded, values, self._names(pair))
        return first, second

    def _encoded(self, value: Any, column: str) -> bytes:
        if isinstance(value, dict):
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if value is None:
            raise Rejected("image is missing", column)
        return self._images.read(value, column) if isinstance(value, str) else _of_limited_size(value, column)

    def _two_files(self, pair: _Pair) -> list[epath.Path | HubFile]:
        values = self._of_each(pair, self._columns.of_images)
        assert values is not None
        found = []
        for value, column in zip(values, self._names(pair), strict=True):
            path = value.get("path") if isinstance(value, dict) else value
            if path is not None:
                file = self._images.file(path, column)
                found.append(file if isinstance(file, HubFile) else file[0] / file[1])
        return found

    def _are_all_outside(self) -> bool:
        """Whether images are only named in the table, as in a folder of images: the first row tells."""
        if not len(self._rows):
            return False
        (record,) = self._records([0], self._columns.of_images, IMAGES_AT_ONCE)
        values = [record[name] for name in self._columns.of_images]
        values = values[0] if self._form == "list" else values
        return bool(values) and all(
            isinstance(value, dict) and value["bytes"] is None and value["path"] is not None for value in values
        )


def check_schema(schema: pa.Schema, columns: Columns, where: object) -> None:
    """That a table has the columns, with types that can be read.

    Raises:
        ValueError: it has not; names the table, the column, and those that are there.
    """
    for field, name in named_columns(columns):
        place = _place(schema, name)
        if place is None:
            there = ", ".join(map(repr, schema.names)) or "none"
            raise ValueError(
                f"{where}: no column {name!r} for columns.{field}; there are {there}: name another one with "
                f"--source.columns.{field.replace('_', '-')}"
            )
        if schema.names.count(place[0]) > 1:
            raise ValueError(f"{where}: column {name!r} is there twice; expected each once")
        expected, kinds = _EXPECTED[field]
        found = kind = _type(schema, place)
        if columns.form == "list" and field in _OF_EACH_IMAGE:
            expected = f"lists of {expected}"
            kind = kind.value_type if _is_any(kind, _LIST) else kind if pa.types.is_null(kind) else pa.bool_()
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not _is_any(kind, (*kinds, pa.types.is_null)):
            raise ValueError(f"{where}: column {name!r} is of type {found}; columns.{field} expects {expected}")


def outer_columns(schema: pa.Schema, columns: Columns) -> list[str]:
    """The columns of a table that hold those that are named, each once."""
    places = (_place(schema, name) for _, name in named_columns(columns))
    return list(dict.fromkeys(place[0] for place in places if place is not None))


def _place(schema: pa.Schema, name: str) -> tuple[str, ...] | None:
    """Where a column is: in the table, or as `json.label` within the structs of another; None: nowhere."""
    if name in schema.names:
        return (name,)
    for end in (i for i, character in enumerate(name) if character == "."):
        if name[:end] in schema.names and pa.types.is_struct(schema.field(name[:end]).type):
            within = pa.schema(list(schema.field(name[:end]).type))
            if (rest := _place(within, name[end + 1 :])) is not None:
                return name[:end], *rest
    return None


def _type(schema: pa.Schema, place: Sequence[str]) -> pa.DataType:
    kind = schema.field(place[0]).type
    for name in place[1:]:
        kind = kind.field(name).type
    return kind


def _inner(record: Record, place: Sequence[str]) -> Any:
    value: Any = record
    for name in place:
        value = None if value is None else value[name]
    return value


def named_columns(columns: Columns) -> Iterator[tuple[str, str]]:
    """Each field of `Columns` that names columns, with each of its columns."""
    for field in _EXPECTED:
        value = getattr(columns, field)
        yield from ((field, name) for name in ((value,) if isinstance(value, str) else value or ()))


def _is_path(kind: pa.DataType) -> bool:
    kind = kind.value_type if _is_any(kind, _LIST) else kind
    return _is_any(kind.value_type if pa.types.is_dictionary(kind) else kind, _TEXT)


def _as_text(value: Any) -> str:
    """A label as it is written in the config: 1 for 1, 1.0 and "1"; true for True."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _without_pair(count: int, detail: str) -> Rejected:
    if count == 1:
        return Rejected("only one image of its prompt", detail, damaged=False)
    return Rejected("scores mean nothing", detail)


@contextlib.contextmanager
def _named(column: str) -> Iterator[None]:
    """Names the column in why a record is rejected."""
    try:
        yield
    except Rejected as rejected:
        reason, detail, damaged = rejected.drop
        raise Rejected(reason, f"{column}: {detail}", damaged=damaged) from rejected
