"""Nested parameters as flat dictionaries."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util


def flatten_dict(params: Mapping[str, Any]) -> dict[tuple[Any, ...], Any]:
    """`flax.traverse_util.flatten_dict` of parameters, whose leaves are arrays; its own type allows for others."""
    return traverse_util.flatten_dict(params)
