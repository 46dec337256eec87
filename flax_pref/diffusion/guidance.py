"""Guidance is a table: every rule is a linear combination of predictions, one row for each.

    eps_hat(x, t) = sum over rows of coefficient * eps_network(x, t, prompt)

A rule is a function that returns its rows. Below, `CFG_s(N) = (1 - s) eps_N(x, empty) + s eps_N(x, text)`.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np


class Row(NamedTuple):
    """One prediction and its share in the guided one."""

    network: str
    prompt: Literal["text", "empty"]
    coefficient: float


def cfg(guidance_scale: float, network: str = "base") -> tuple[Row, ...]:
    """Classifier-free guidance, `CFG_s(network)` (arXiv:2207.12598, here s = 1 is no guidance).

    Raises:
        ValueError: guidance_scale is not finite.
    """
    return _combine(guidance_scale, {network: 1.0})


def pgd(w: float, guidance_scale: float, fine_tuned: str = "dpo") -> tuple[Row, ...]:
    """Preference-guided denoising, `(1 - w) CFG_s(base) + w CFG_s(fine_tuned)` (arXiv:2602.18799).

    w = 0 is the base network, w = 1 the fine-tuned one, and w > 1 extrapolates.

    Raises:
        ValueError: w or guidance_scale is not finite.
    """
    return _combine(guidance_scale, {"base": 1 - w}, {fine_tuned: w}, w=w)


def cpgd(w: float, guidance_scale: float, positive: str = "pos", negative: str = "neg") -> tuple[Row, ...]:
    """Contrastive preference guidance, `CFG_s(base) + w (CFG_s(positive) - CFG_s(negative))` (arXiv:2602.18799).

    With "base" for one of the two modules it is the one-sided rule of the other.

    Raises:
        ValueError: w or guidance_scale is not finite.
    """
    return _combine(guidance_scale, {"base": 1.0}, {positive: w}, {negative: -w}, w=w)


def layout(rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    """What has to be predicted, `(network, prompt)` per row: static and hashable, the same for all strengths."""
    return tuple((row.network, row.prompt) for row in rows)


def coefficients(rows: Sequence[Row]) -> np.ndarray:
    """Float32 `[R]`, in the order of the rows."""
    return np.array([row.coefficient for row in rows], np.float32)


def _combine(guidance_scale: float, *terms: dict[str, float], **strengths: float) -> tuple[Row, ...]:
    """The rows of `sum over terms and networks of weight * CFG_s(network)`.

    A network that several terms name gets the sum of its weights and one pair of rows. Rows of coefficient zero stay:
    the layout must not depend on strengths, or a sweep over them would compile anew.
    """
    for name, value in {**strengths, "guidance_scale": guidance_scale}.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    weights: dict[str, float] = {}
    for term in terms:
        for network, weight in term.items():
            weights[network] = weights.get(network, 0.0) + weight
    rows = tuple(
        Row(network, prompt, weight * share)
        for network, weight in weights.items()
        for prompt, share in (("empty", 1 - guidance_scale), ("text", guidance_scale))
    )
    for row in rows:
        if not math.isfinite(row.coefficient):
            raise ValueError(f"coefficient of ({row.network}, {row.prompt}) must be finite, got {row.coefficient}")
    return rows
