"""Distances between sets of images, and the diversity of one, from features of the images; all in float64.

FID (arXiv:1706.08500), KID (1801.01401), CMMD (2401.09603), improved precision and recall (1904.06991) and the Vendi
score (2210.02410). Which features they are computed from is the caller's concern.
"""

from typing import NamedTuple

import numpy as np

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
NEIGHBOURS = 3  # of precision and recall
ROWS = 1024  # of distances that are in memory at a time


class Moments(NamedTuple):
    """Mean `[D]` and covariance `[D, D]` of features; `images` of them, None where that is not known."""

    mean: np.ndarray
    covariance: np.ndarray
    images: int | None = None


def moments(features: np.ndarray) -> Moments:
    """Mean and unbiased covariance of features `[N, D]`, N at least 2."""
    features = np.asarray(features, np.float64)
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images, and there are {len(features)}")
    mean = features.mean(axis=0)
    centred = features - mean
    return Moments(mean, centred.T @ centred / (len(features) - 1), len(features))


def frechet_distance(one: Moments, other: Moments) -> float:
    """The Frechet distance of two normal distributions, which of Inception's features is FID.

    `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`. With `S1 = L L^T`, the trace of the root is the sum of the roots of
    the eigenvalues of `L^T S2 L`, a symmetric matrix; L has as many columns as S1 has eigenvalues that are not 0, so
    that few images are no special case.

    Raises:
        ValueError: the two are of features of different lengths.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"features of {len(one.mean)} and of {len(other.mean)} numbers cannot be compared")
    values, vectors = np.linalg.eigh(one.covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    factor = vectors[:, kept] * np.sqrt(values[kept])
    mixed = np.linalg.eigvalsh(factor.T @ other.covariance @ factor)
    shared = np.sqrt(np.maximum(mixed, 0)).sum()
    difference = np.square(one.mean - other.mean).sum()
    return max(0.0, float(difference + np.trace(one.covariance) + np.trace(other.covariance) - 2 * shared))


def kernel_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """KID: the unbiased squared MMD with the kernel `(x y / D + 1)^3`, over all images at once; may be below 0.

    Args:
        features: `[N, D]`, N at least 2.
        reference: `[M, D]`, M at least 2.
    """
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)

    def mean(a: np.ndarray, b: np.ndarray, *, same: bool) -> float:
        total = 0.0
        for start in range(0, len(a), ROWS):
            kernel = (a[start : start + ROWS] @ b.T / a.shape[1] + 1) ** 3
            total += kernel.sum()
            if same:
                total -= np.trace(kernel, offset=start)
        return total / (len(a) * (len(b) - same))

    return mean(x, x, same=True) + mean(y, y, same=True) - 2 * mean(x, y, same=False)


def cmmd(features: np.ndarray, reference: np.ndarray) -> float:
    """CMMD: 1000 times the squared MMD, in its form that is never negative, with a normal kernel of width 10.

    Args:
        features: `[N, D]`, embeddings of length 1 of CLIP.
        reference: `[M, D]`.
    """
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        parts = (a[start : start + ROWS] for start in range(0, len(a), ROWS))
        return sum(np.exp(-_squares(part, b) / (2 * CMMD_SIGMA**2)).sum() for part in parts) / (len(a) * len(b))

    return float(CMMD_SCALE * (mean(x, x) + mean(y, y) - 2 * mean(x, y)))


def precision_recall(
    features: np.ndarray, reference: np.ndarray, *, neighbours: int = NEIGHBOURS
) -> tuple[np.ndarray, np.ndarray]:
    """Which images lie among those of the reference, and which of the reference among the images.

    An image lies among others if it is no further from one of them than that one's k-th nearest neighbour. Precision
    and recall are the means of both.

    Args:
        features: `[N, D]`, N more than `neighbours`.
        reference: `[M, D]`, M more than `neighbours`.
        neighbours: k.

    Returns:
        bool `[N]` and bool `[M]`.
    """
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    if min(len(x), len(y)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more images than there are, {min(len(x), len(y))}")
    return _among(x, y, neighbours), _among(y, x, neighbours)


def _among(points: np.ndarray, others: np.ndarray, neighbours: int) -> np.ndarray:
    """Which points are within the radius of one of the others."""
    radii = np.empty(len(others))
    for start in range(0, len(others), ROWS):
        squares = _squares(others[start : start + ROWS], others)
        rows = np.arange(len(squares))
        squares[rows, start + rows] = 0  # of a point to itself, without rounding
        radii[start : start + ROWS] = np.partition(squares, neighbours, axis=1)[:, neighbours]
    parts = (points[start : start + ROWS] for start in range(0, len(points), ROWS))
    return np.concatenate([(_squares(part, others) <= radii).any(axis=1) for part in parts])


def _squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distances `[N, M]`."""
    products = x @ y.T
    return np.maximum(np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * products, 0)


def vendi_score(features: np.ndarray) -> float:
    """How many different images there are, from 1 (all alike) to N: the exponential of an entropy.

    It is that of the eigenvalues of `K / N`, where K holds the cosines of all pairs.

    Args:
        features: `[N, D]`, finite and not 0; of any length, only their directions count.
    """
    units = np.asarray(features, np.float64)
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    # Of the two products the smaller one: both have the same eigenvalues that are not 0.
    gram = units @ units.T if len(units) <= units.shape[1] else units.T @ units
    values = np.linalg.eigvalsh(gram) / len(units)
    values = values[values > 0]
    return float(np.exp(-(values * np.log(values)).sum()))
