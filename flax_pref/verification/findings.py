"""Findings of the checks of `flax-pref verify`, and the settings, numbers and recorded values that checks share."""

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

RECORDED = "recorded.json"


class Finding(NamedTuple):
    """Result of a check.

    Attributes:
        name: of what was checked.
        passed: None: nothing was asked for, or it could not be checked here; `told` says why.
        told: the figures, in words.
        figures: the same, as JSON can hold them.
    """

    name: str
    passed: bool | None
    told: str
    figures: Mapping[str, Any]


class Setting(NamedTuple):
    """Settings of all checks.

    Attributes:
        dtype: of kernels.
        model: checkpoint to compare with diffusers; "" for none.
        rewards: name and path of rewards to score pictures with; no path: as published.
        recorded: scores that another machine has reported, by rewards.
    """

    dtype: str
    model: str = ""
    rewards: Sequence[tuple[str, str | None]] = ()
    recorded: Mapping[str, Sequence[float]] = MappingProxyType({})


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Standard normal numbers, the same on any machine."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def relative(found: Any, expected: Any) -> float:
    """Largest difference relative to the largest value; infinite where a number is not finite."""
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    error = np.abs(found - expected).max() / np.abs(expected).max()
    return float(error) if np.isfinite(error) else math.inf


def read_recorded(check: str) -> Any:
    """The values that a check expects on every machine."""
    return json.loads((resources.files("flax_pref.verification") / RECORDED).read_text(encoding="utf-8"))[check]
