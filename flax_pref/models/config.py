"""Reading and writing the JSON configs of published checkpoints as typed dataclasses."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

C = TypeVar("C")
# Far beyond what any network has: more is a damaged file, and would take minutes and all memory before it fails.
MOST_LAYERS, LARGEST = 256, 2**24


def from_json(cls: type[C], values: Mapping[str, Any], *, only: Mapping[str, tuple], strict: bool) -> C:
    """Builds the frozen dataclass `cls` from a parsed config file.

    Args:
        cls: a dataclass whose fields are named as in the file; absent fields take their defaults, lists become tuples.
        values: the parsed JSON object. Keys that begin with "_" are bookkeeping of the library that wrote the file.
        only: fields of which this implementation supports certain values only, and these values.
        strict: a key that is neither a field nor in `only` must be null or false (a feature switched off); otherwise
            such keys have no effect on the network and are passed over.

    Raises:
        ValueError: a value or key that is not supported; names the field, the value and what is supported.
    """
    fields = typing.get_type_hints(cls)
    chosen = {}
    for key, value in values.items():
        if key.startswith("_"):
            continue
        value = tuple(value) if isinstance(value, list) else value
        if not _is_finite(value):
            raise ValueError(
                f"{cls.__name__}: {key}={value!r:.80} is not supported; supported: finite numbers of float32"
            )
        if key in only and value not in only[key]:
            supported = " or ".join(repr(v) for v in only[key])
            raise ValueError(f"{cls.__name__}: {key}={value!r:.80} is not supported; supported: {supported}")
        if key in fields:
            if not _is_a(value, fields[key]):
                kind = fields[key].__name__ if isinstance(fields[key], type) else fields[key]
                raise ValueError(
                    f"{cls.__name__}: {key}={value!r:.80} is not supported; supported: a value of type {kind}"
                )
            chosen[key] = value
        elif strict and key not in only and value not in (None, False):
            raise ValueError(
                f"{cls.__name__}: unknown field {key}={value!r}; remove it if it has no effect on the network"
            )
    return cls(**chosen)


def _is_finite(value: Any) -> bool:
    """Whether all floats in a value are finite in float32, which networks and solvers compute in."""
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or abs(value) <= float(np.finfo(np.float32).max)


def check_sizes(config: Any, fields: Sequence[str], most: int = LARGEST, *, least: int = 1) -> None:
    """Checks that fields hold integers from `least` to `most`, or tuples of such; None passes.

    Raises:
        ValueError: one does not; names the field, the value and what is supported.
    """
    for field in fields:
        value = getattr(config, field)
        values = value if isinstance(value, tuple) else (value,)
        if value is not None and not all(type(number) is int and least <= number <= most for number in values):
            raise ValueError(
                f"{type(config).__name__}: {field}={value!r:.80} is not supported; supported: integers from {least} to "
                f"{most}"
            )


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type, e.g. `int | tuple[int, ...]`; booleans are no numbers."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_is_a(value, option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        item, *rest = typing.get_args(kind)
        kinds = (item,) * len(value) if rest == [...] and isinstance(value, tuple) else (item, *rest)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is_a, value, kinds))
    if kind is float:
        return type(value) in (int, float) and abs(value) <= float(np.finfo(np.float32).max)
    if kind is int:
        return type(value) is int
    return isinstance(value, kind)


def to_json(config: Any, **extra: Any) -> dict[str, Any]:
    """The fields of a config dataclass as a JSON object (tuples become lists), after the `extra` keys."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return extra | {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
