"""Files and folders that appear under their name only when they are complete, one writer per folder, and JSON files."""

import contextlib
import errno
import json
import math
import os
import shlex
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import filelock

from flax_pref.config import UserError

LOCK, HOLDER = ".lock", ".lock.json"  # the second says who holds the first

# How the names of files end that a download or a copy has not finished, or that are compressed.
_UNFINISHED = ("part", "partial", "crdownload", "incomplete", "download", "tmp", "temp", "aria2", "filepart")
_COMPRESSED = ("gz", "bz2", "xz", "zst", "lz4", "zip")


class Named(Protocol):
    """A file or folder, wherever it is."""

    @property
    def name(self) -> str:
        """Without its folders."""
        ...


P = TypeVar("P", bound=Named)


def files_of_kind(paths: Iterable[P], suffix: str) -> list[P]:
    """The files with a suffix in any case, in the order of their names; hidden ones are not looked at.

    Args:
        paths: of one folder.
        suffix: e.g. ".tar".

    Raises:
        ValueError: beside them is one that a download has not finished, or a compressed one; names it.
    """
    paths = sorted((path for path in paths if not path.name.startswith(".")), key=lambda path: path.name)
    found = [path for path in paths if path.name.lower().endswith(suffix)]
    endings = tuple(f"{suffix}.{ending}" for ending in (*_UNFINISHED, *_COMPRESSED))
    left_out = [path for path in paths if path.name.lower().endswith(endings)]
    if found and left_out:
        raise ValueError(
            f"{left_out[0]}: is unfinished or compressed, and would be left out beside {len(found)} *{suffix}; finish "
            "the download, decompress it, or move it elsewhere"
        )
    return found


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file or folder at, which then takes the place of `path`.

    If the block raises, what it has written is removed and `path` is as it was. A folder can only take the place of an
    empty one, or of none.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """`replacing` for a folder that must not exist, or be empty.

    Raises:
        FileExistsError: it holds something, or is a file.
    """
    check_new(folder)
    with replacing(folder) as unfinished:
        unfinished.mkdir()
        yield unfinished


def check_new(folder: str | Path) -> None:
    """Checks that `new_folder` can write a folder.

    Raises:
        FileExistsError: it holds something, or is a file.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not empty; choose another folder or remove it")


@contextlib.contextmanager
def one_writer(folder: str | os.PathLike) -> Iterator[None]:
    """Lets one program at a time write into a folder.

    The operating system drops the lock when the program ends, however it ends. The hidden file `.lock` stays. Where
    the file system cannot lock, one line on stderr says so and the program proceeds. A folder in a bucket (gs://...)
    is not locked.

    Args:
        folder: exists.

    Raises:
        UserError: another program writes into it; names its command, process, host and start.
    """
    if "://" in os.fspath(folder):
        yield
        return
    folder = Path(folder)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(
            f"{folder}: another program writes into this folder{_holder(folder / HOLDER)}; wait for it, or end it"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        print(f"{folder}: cannot be locked ({reason}); start no other program that writes into it", file=sys.stderr)
        yield
        return
    try:
        (folder / HOLDER).unlink(missing_ok=True)  # of a program that was killed
        holder = {
            "command": shlex.join(sys.orig_argv)[:200],
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        }
        with contextlib.suppress(OSError), replacing(folder / HOLDER) as unfinished:
            write_json(unfinished, holder)
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(file: Path) -> str:
    """Who holds a lock, in parentheses; nothing where the file does not tell yet."""
    try:
        holder = read_json(file, expected="the holder of a lock")
        return " ({command}; process {process} on {host}, since {since})".format(**holder)
    except (OSError, ValueError, KeyError):
        return ""


def remedy(error: OSError) -> str:
    """What to do about a file that could not be written, as a clause of a message."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make the folder writable"
    return "remove the cause"


@contextlib.contextmanager
def writing(path: str | os.PathLike, then: str = "") -> Iterator[None]:
    """Names the file or folder that the block writes where the system's error does not, as that of a full disk.

    Args:
        path: for the message.
        then: what happens when the same command runs again, as a clause.

    Raises:
        OSError: it cannot be written; says why and what to do. Errors that have a message of their own pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            f"{path}: cannot be written ({error.strerror or error}); {remedy(error)} and run the same command "
            f"again{then and ', ' + then}"
        ) from error


def read_json(file: str | Path, *, expected: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        file: to read.
        expected: for messages: what the file should be or belong to, e.g. "a folder in the layout of diffusers".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object, has a key twice, or a number in it is not finite.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected {expected}")
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); expected {expected}: download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: holds a JSON {type(values).__name__}, not an object; expected {expected}")
    return values


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a key that is there twice, Python would take the last value and say nothing.

    Raises:
        ValueError: a key is there twice with different values; names it.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if value != values[key]:
                raise ValueError(f"the key {key!r:.80} is there twice")
    return values


def _finite(text: str) -> float:
    """A number of a JSON file; Python reads NaN, Infinity and 1e999 too.

    -Infinity passes, which diffusers writes for a scheduler that does not clip; `models.config` refuses it elsewhere.
    """
    if not math.isfinite(number := float(text)) and text != "-Infinity":
        raise ValueError(f"{text:.20} is no finite number")
    return number


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object, readably."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def difference(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two settings, as `w=4, now w=5; steps=50, now steps=20`."""

    def told(values: Mapping[str, Any], name: str) -> str:
        if name not in values:
            return f"no {name}"
        text = str(values[name])
        return f"{name}={text[:77]}..." if len(text) > 80 else f"{name}={text}"

    return "; ".join(
        f"{told(begun, name)}, now {told(now, name)}"
        for name in {**begun, **now}
        if (name in begun, begun.get(name)) != (name in now, now.get(name))
    )
