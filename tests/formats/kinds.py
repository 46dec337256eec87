"""What a row of the matrix in docs/formats.md is: a kind of file, how it is made, read, written and compared."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Numbers = Mapping[str, np.ndarray]


class Made(NamedTuple):
    """A file or folder of a kind.

    Attributes:
        path: what a user gives to the reader.
        expected: the numbers that the library in the column "reference" has of it.
    """

    path: Path
    expected: Callable[[], Numbers]


def layer_of(key: str) -> str:
    """The layer of a weight; all of a name that has no dots."""
    return key.rpartition(".")[0] or key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file.

    Attributes:
        name: first column of the table.
        read: the flag, field or function that reads it, as the table shows it.
        reference: what its numbers are compared with.
        make: writes one into an empty folder.
        load: reads it as users do, and gives what `numbers` takes.
        numbers: of what was read, by names that `Made.expected` has too.
        written: the call or flag that writes it; "" where nothing here does.
        write: the same in code: writes what was read into an empty folder and gives its path.
        needs: libraries that make it or that it is compared with.
        damaged: name of the file that damages change, in the folder that was made; "" for the path itself.
        sort: keys with the same value are damaged alike, so that one of them is enough; None: not damaged.
        harmless: damages that are no error, and why: by "truncated", "stranger", or "missing KEY", "surplus KEY" and
            "shape KEY", where KEY is a pattern.
        names: what a message says of a missing or misshapen key: its layer, where another weight of that is named.
        surplus: keys that have no place in it.
        stranger: name of a kind of another family, whose file is refused in its place.
    """

    name: str
    read: str
    reference: str
    make: Callable[[Path], Made]
    load: Callable[[Path], Any]
    numbers: Callable[[Any], Numbers]
    written: str = ""
    write: Callable[[Any, Path], Path] | None = None
    needs: tuple[str, ...] = ("torch", "diffusers")
    damaged: str = ""
    sort: Callable[[str], str | None] = str
    harmless: Mapping[str, str] = dataclasses.field(default_factory=dict)
    names: Callable[[str], str] = layer_of
    surplus: str = "other.weight"
    stranger: str = ""


def worst_difference(ours: Numbers, theirs: Numbers) -> float:
    """The largest absolute difference.

    Raises:
        AssertionError: they are not of the same names and shapes.
    """
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:5]
    worst = 0.0
    for name, array in ours.items():
        assert np.shape(array) == np.shape(theirs[name]), (name, np.shape(array), np.shape(theirs[name]))
        if np.size(array):
            worst = max(worst, float(np.abs(np.float64(array) - np.float64(theirs[name])).max()))
    return worst
