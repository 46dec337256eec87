"""Damaged files: cut, with a key missing, a key too many or a value of another shape or type, in every format.

A key is the name of a weight, a column, a field of all records, an entry of an object, or the ending of the members of
a tar file.
"""

import copy
import csv
import datetime
import json
import os
import shutil
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.data.preference_sets import tar_of

KEPT = 0.6  # of a file that is cut


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        items: by their keys.
        save: writes a file with these items in the place of the other.
        wrong: makes of a value one of another shape or type.
    """

    items: dict[str, Any]
    save: Callable[[dict[str, Any]], None]
    wrong: Callable[[Any], Any]


def content_of(file: Path) -> Content:
    """What a file holds, by its suffix."""
    return FORMATS[file.suffix](file)


def _safetensors(file: Path) -> Content:
    data = file.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    metadata = header.pop("__metadata__", None)
    items = {
        name: (entry["dtype"], entry["shape"], data[size + entry["data_offsets"][0] : size + entry["data_offsets"][1]])
        for name, entry in header.items()
    }

    def save(items: dict[str, Any]) -> None:
        described = {} if metadata is None else {"__metadata__": metadata}
        end = 0
        for name, (dtype, shape, numbers) in items.items():
            described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(numbers)]}
            end += len(numbers)
        encoded = json.dumps(described).encode()
        start = len(encoded).to_bytes(8, "little") + encoded
        file.write_bytes(start + b"".join(numbers for _, _, numbers in items.values()))

    def wrong(value: Any) -> Any:
        dtype, shape, numbers = value
        return dtype, [2 * shape[0], *shape[1:]] if shape else [2], 2 * numbers

    return Content(items, save, wrong)


def _torch(file: Path) -> Content:
    import torch

    from flax_pref.checkpoints.torch_files import is_torchscript

    if is_torchscript(file):
        return _script(file)
    whole = torch.load(file, weights_only=False)
    if isinstance(whole, torch.nn.Module):
        return _torch_module(file, whole)
    within = next((key for key in ("state_dict", "string_to_param") if key in whole), None)
    items = whole if within is None else whole[within]

    def save(items: dict[str, Any]) -> None:
        torch.save(items if within is None else whole | {within: items}, file)

    return Content(dict(items), save, lambda tensor: torch.stack([tensor, tensor]).flatten(0, min(1, tensor.ndim)))


def _torch_module(file: Path, whole: Any) -> Content:
    import torch

    state = dict(whole.state_dict())

    def save(items: dict[str, Any]) -> None:
        changed = copy.deepcopy(whole)
        for name in state.keys() | items.keys():
            path, _, leaf = name.rpartition(".")
            if name not in state:
                changed.add_module(path, torch.nn.Module())
            part = changed.get_submodule(path)
            part._parameters.pop(leaf, None)
            part._buffers.pop(leaf, None)
            if name in items:
                part._buffers[leaf] = items[name]
        torch.save(changed, file)

    return Content(state, save, lambda tensor: torch.stack([tensor, tensor]).flatten(0, min(1, tensor.ndim)))


def _script(file: Path) -> Content:
    """A program of TorchScript, of which only the weights are known."""
    import torch

    from tests.parity.inception_reference import save_script

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        items = torch.jit.load(file).state_dict()
    return Content(dict(items), lambda items: save_script(items, file), lambda tensor: torch.cat([tensor, tensor]))


def _parquet(file: Path) -> Content:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    return Content(
        dict(zip(table.column_names, table.columns, strict=True)),
        lambda items: pq.write_table(pa.table(items), file),
        _days,
    )


def _arrow(file: Path) -> Content:
    import pyarrow as pa

    table = pa.ipc.open_stream(file.read_bytes()).read_all()

    def save(items: dict[str, Any]) -> None:
        changed = pa.table(items)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, changed.schema) as stream:
            stream.write_table(changed)

    return Content(dict(zip(table.column_names, table.columns, strict=True)), save, _days)


def _days(column: Any) -> Any:
    """A column of a type that nothing has."""
    import pyarrow as pa

    return pa.chunked_array([pa.array([datetime.date(2026, 1, 1)] * len(column))])


def _json(file: Path) -> Content:
    whole = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(whole, list):
        return _records(whole, lambda records: file.write_text(json.dumps(records), encoding="utf-8"))
    within = ("model", "vocab") if file.name == "tokenizer.json" else ()
    items = whole
    for key in within:
        items = items[key]

    def save(changed: dict[str, Any]) -> None:
        items.clear()
        items.update(changed)
        file.write_text(json.dumps(whole), encoding="utf-8")

    return Content(dict(items), save, lambda value: [value, value])


def _json_lines(file: Path) -> Content:
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return _records(records, lambda changed: file.write_text("\n".join(map(json.dumps, changed)), encoding="utf-8"))


def _records(records: list[dict[str, Any]], save: Callable[[list[dict[str, Any]]], Any]) -> Content:
    """Fields as columns; one that a record lacks is ... there."""
    columns = {key: [record.get(key, ...) for record in records] for record in records for key in record}

    def saved(columns: dict[str, Any]) -> None:
        save([{key: values[i] for key, values in columns.items() if values[i] is not ...} for i in range(len(records))])

    return Content(columns, saved, lambda values: [{"wrong": 1} for _ in values])


def _csv(file: Path) -> Content:
    with file.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)

    def save(items: dict[str, Any]) -> None:
        with file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([list(items), *zip(*items.values(), strict=True)])

    columns = {key: [row[place] for row in rows] for place, key in enumerate(header)}
    return Content(columns, save, lambda values: [""] * len(values))


def _tar(file: Path) -> Content:
    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(file) as tar:
        for member in tar:
            stem, _, ending = member.name.partition(".")
            members.setdefault(ending, {})[stem] = tar.extractfile(member).read()  # pyright: ignore

    def save(items: dict[str, dict[str, bytes]]) -> None:
        stems = sorted({stem for bodies in items.values() for stem in bodies})
        named = [
            (f"{stem}.{ending}", bodies[stem]) for stem in stems for ending, bodies in items.items() if stem in bodies
        ]
        file.write_bytes(tar_of(named))

    return Content(members, save, lambda bodies: {stem: body[: len(body) // 2] for stem, body in bodies.items()})


FORMATS: dict[str, Callable[[Path], Content]] = {
    ".safetensors": _safetensors,
    **dict.fromkeys((".bin", ".ckpt", ".pt", ".pth"), _torch),
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".tar": _tar,
}


# ----------------------------------------------------------------------------------------------------------------------
# Damages


def copied(path: Path, damaged: str, place: Path) -> tuple[Path, Path]:
    """A copy of what was made, with all that lies beside it.

    Args:
        path: of the file or folder.
        damaged: see `Kind.damaged`.
        place: an empty folder.

    Returns:
        (the path of the copy, the file in it that may be changed; the others are links).
    """
    shutil.copytree(path.parent, place / "copy", copy_function=os.link)
    copy = place / "copy" / path.name
    file = copy / damaged if damaged else copy
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    return copy, file


def cut(file: Path) -> None:
    """Takes the end of a file away."""
    os.truncate(file, int(KEPT * file.stat().st_size))


def without(file: Path, key: str) -> None:
    """Takes a key away."""
    content = content_of(file)
    content.save({name: value for name, value in content.items.items() if name != key})


def with_surplus(file: Path, key: str) -> None:
    """Adds a key, with the value of another."""
    content = content_of(file)
    content.save({**content.items, key: next(reversed(content.items.values()))})


def misshapen(file: Path, key: str) -> None:
    """Changes the shape or the type of a value."""
    content = content_of(file)
    content.save({name: content.wrong(value) if name == key else value for name, value in content.items.items()})
