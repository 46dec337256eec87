"""Rows of JSON in a file, of which only the places are kept in memory; and the images that they name."""

import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np
from etils import epath

from flax_pref.data.fields import Rejected, accepted, json_object
from flax_pref.data.images import MOST_BYTES
from flax_pref.data.pairs import Drop

_SPACE = re.compile(r"[ \t\n\r]*")
_BOM = b"\xef\xbb\xbf"


class JsonRows:
    """Random access to rows by their place in the file."""

    def __init__(self, file: epath.Path, places: Sequence[int]):
        """Takes where each row begins and ends, in bytes: two numbers for each.

        Raises:
            ValueError: there are no rows.
        """
        if not len(places):
            raise ValueError(f"{file}: no records in it; expected at least one")
        self.file = file
        self._places = np.array(places, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._places)

    def objects(self, rows: Iterable[int]) -> Iterator[dict[str, Any] | Drop]:
        """The objects that the rows are; of the same row again the same object.

        Raises:
            ValueError: the file has become shorter.
        """
        with self.file.open("rb") as opened:
            for row, repeats in itertools.groupby(rows):
                found = self._object(opened, row)
                yield from (found for _ in repeats)

    def _object(self, opened: IO[bytes], row: int) -> dict[str, Any] | Drop:
        start, end = map(int, self._places[row])
        opened.seek(start)
        data = opened.read(end - start)
        if len(data) < end - start:
            raise ValueError(f"{self.file}: ends in row {row}, but was longer before; leave it as it is")
        return accepted(json_object, data)


def _after_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return place if match is None else match.end()


def list_elements(file: epath.Path) -> Iterator[tuple[int, int, Any]]:
    """Where each element of a JSON list begins and ends, in bytes, and its value.

    Texts of the value that are not ASCII are wrong: the file is read as Latin-1, in which places are bytes.

    Raises:
        ValueError: the file is not a JSON list.
    """
    data = file.read_bytes()
    text = data.decode("latin-1")
    place = _after_space(text, len(_BOM) if data.startswith(_BOM) else 0)
    del data
    if text[place : place + 1] != "[":
        raise ValueError(f"{file}: begins with {text[place : place + 20]!r}; expected a JSON list of records")
    place = _after_space(text, place + 1)
    decoder = json.JSONDecoder()
    ended = text[place : place + 1] == "]"
    while not ended:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise _not_json(file, place, getattr(error, "msg", error)) from error
        yield place, end, value
        place = _after_space(text, end)
        mark = text[place : place + 1]
        if mark not in ("]", ","):
            raise _not_json(file, place, "expected a comma, or a bracket that ends the list")
        ended = mark == "]"
        place = place if ended else _after_space(text, place + 1)
    if _after_space(text, place + 1) < len(text):
        raise _not_json(file, place, "something follows the list")


def json_lines(file: epath.Path) -> Iterator[tuple[int, int, int]]:
    """Where each line that is not blank begins and ends, in bytes, and its number from 1 up.

    Raises:
        ValueError: a line holds zeros, so that its end may be missing and other lines with it.
    """
    place = 0
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            if b"\0" in line:
                raise ValueError(
                    f"{file}, line {number}: holds zeros; either a download was not finished, or the file is not in "
                    "UTF-8: download it again, or save it as UTF-8"
                )
            mark = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
            if line[mark:].strip():
                yield place + mark, place + len(line), number
            place += len(line)


def read_images(folder: epath.Path, names: tuple[str, str]) -> tuple[bytes, bytes] | Drop:
    """Two files of a folder.

    Only regular files within the folder are opened, however links lead there: a FIFO would block for ever, a device may
    never end.
    """
    found = []
    for name in names:
        data = accepted(read_image, folder, name)
        if isinstance(data, Drop):
            return data
        found.append(data)
    return found[0], found[1]


def read_image(folder: epath.Path, name: str) -> bytes:
    """A file of a folder, opened only if it is a regular file within it.

    Raises:
        Rejected: it is not, or it cannot be read.
    """
    try:
        if "://" not in os.fspath(folder):
            _check_regular(folder, name)
        with (folder / name).open("rb") as opened:
            data = opened.read(MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Rejected("image is missing", name) from error
    except IsADirectoryError as error:
        raise Rejected("image is no regular file", f"{name}: a folder") from error
    except OSError as error:
        raise Rejected("image cannot be read", f"{name}: {error.strerror or error}") from error
    if len(data) > MOST_BYTES:
        raise Rejected("image is too large", f"{name}: more than {MOST_BYTES} bytes")
    return data


def _check_regular(folder: epath.Path, name: str) -> None:
    """Rejects what is no regular file within the folder, before it is opened."""
    root, path = os.path.realpath(folder), os.path.realpath(folder / name)
    if os.path.commonpath([root, path]) != root:
        raise Rejected("path leaves the folder of the set", f"{name}: a link to {path}")
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise Rejected("image is no regular file", f"{name}: {kinds.get(stat.S_IFMT(mode), 'a device')}")


def named_files(folder: epath.Path, names: Iterable[tuple[str, str] | Drop]) -> list[epath.Path]:
    """Files of a folder by the names of rows, each once."""
    there = (pair for pair in names if not isinstance(pair, Drop))
    return [folder / name for name in dict.fromkeys(itertools.chain.from_iterable(there))]


def check_columns(row: Any, needed: Sequence[str], where: str, layout: str) -> None:
    """Checks the first record of a file, whose columns the others will have too.

    Raises:
        ValueError: it lacks one.
    """
    there = list(row) if isinstance(row, dict) else []
    if missing := [name for name in needed if name not in there]:
        raise ValueError(
            f"{where}: no column {missing[0]!r}; there are {', '.join(map(repr, there)) or 'none'}, and {layout} has "
            f"{', '.join(map(repr, needed))}"
        )


def field(row: dict[str, Any], name: str) -> Any:
    """The value of a column that the first record has."""
    if name not in row:
        raise Rejected("a field is missing", name)
    return row[name]


def _not_json(file: epath.Path, place: int, reason: object) -> ValueError:
    return ValueError(f"{file}, byte {place}: not JSON ({reason}); download it again")
