"""Aspect-ratio buckets: sizes of about one area, which one a pair is cut to, and whose batch comes at which step."""

import math
import string
from collections.abc import Iterable, Sequence

import numpy as np

Size = tuple[int, int]
"""Height and width in pixels."""
Numbers = Sequence[int] | np.ndarray
"""Of pairs, ascending."""
LETTERS = string.digits + string.ascii_letters
"""Each is the number of a size, so that a short text tells the sizes of many pairs."""
MOST_SIZES = len(LETTERS)


def bucket_sizes(size: Size, step: int, aspect: float = 2.0) -> tuple[Size, ...]:
    """All sizes of about the area of one size, ascending by height.

    For each short side: the longest long side with which the area is not larger than that of `size`. So no bucket takes
    more memory than `size`. SDXL was trained in buckets of this kind, of 64 pixels (arXiv:2307.01952, section 2.3).

    Args:
        size: one of the sizes.
        step: sides are multiples of so many pixels.
        aspect: most that a long side may be, as a multiple of the short one.
    """
    area, found = math.prod(size), {size}
    for short in range(step, math.isqrt(area) + 1, step):
        long = area // short // step * step
        if long <= aspect * short:
            found |= {(short, long), (long, short)}
    return tuple(sorted(found))


def nearest_size(sizes: Sequence[Size], images: Iterable[Size]) -> Size:
    """The size of the nearest aspect ratio, by the logarithm of width / height; of equally near ones the first.

    Args:
        sizes: to choose from.
        images: sizes of the images that are to have one size: the mean of their logarithms counts.
    """
    logs = [_log_aspect(image) for image in images]
    wanted = sum(logs) / len(logs)
    return min(sizes, key=lambda size: abs(_log_aspect(size) - wanted))


def _log_aspect(size: Size) -> float:
    height, width = size
    return math.log(width / height)


def size_text(size: Sequence[int]) -> str:
    """Height and width for messages."""
    return f"{size[0]} x {size[1]}"


def turns(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Whose batch comes at each step of a round, in which every bucket has turns in proportion to its pairs.

    Of n turns in a round, the k-th (from 0 up) comes at the time (k + 1/2) / n: the turns of a bucket are evenly
    spaced, and those of all buckets are in the order of their times, those of equal times in the order of buckets.

    Args:
        counts: pairs of each bucket, all positive.

    Returns:
        int16 `[R]`, the bucket of each step of a round, and int32 `[R]`, how many turns it had before in this round; R
        is the sum of the counts, divided by their greatest common divisor.
    """
    each = np.array(counts) // math.gcd(*counts)
    before = [np.arange(n) for n in each]
    times = np.concatenate([(2 * k + 1) / (2 * n) for k, n in zip(before, each, strict=True)])
    order = np.argsort(times, kind="stable")
    buckets = np.repeat(np.arange(len(each)), each)
    return buckets[order].astype(np.int16), np.concatenate(before)[order].astype(np.int32)
