"""Files and folders that appear under their name only when they are complete, and JSON files that name themselves."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


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
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not empty; choose another folder or remove it")
    with replacing(folder) as unfinished:
        unfinished.mkdir()
        yield unfinished


def read_json(file: str | Path, *, expected: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        file: to read.
        expected: for messages: what the file should be or belong to, e.g. "a folder in the layout of diffusers".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected {expected}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); expected {expected}: download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: holds a JSON {type(values).__name__}, not an object; expected {expected}")
    return values


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
