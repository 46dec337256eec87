"""Paired statistics: methods drew images of each prompt from the same noise, and every prompt counts once.

What is resampled and tested is the prompt: images of one prompt, from several seeds, are averaged first
(`cluster_means`), as they are not independent of one another.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np


def gains(scores: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Difference of the scores per prompt, float64 `[N]`.

    Raises:
        ValueError: the scores are not two finite arrays `[N]` of one length, N at least 2.
    """
    scores, baseline = np.asarray(scores, np.float64), np.asarray(baseline, np.float64)
    if scores.ndim != 1 or scores.shape != baseline.shape or len(scores) < 2:
        raise ValueError(
            f"paired statistics need two scores for each of at least 2 prompts, got shapes {list(scores.shape)} and "
            f"{list(baseline.shape)}"
        )
    if not (np.isfinite(scores).all() and np.isfinite(baseline).all()):
        first = int(np.flatnonzero(~np.isfinite(scores) | ~np.isfinite(baseline))[0])
        raise ValueError(f"the score of prompt {first} is not finite: {scores[first]} against {baseline[first]}")
    return scores - baseline


def wins(scores: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """1 where a prompt's score beats the baseline's, 0.5 for a tie, else 0: float64 `[N]`; errors as in `gains`."""
    return won(gains(scores, baseline))


def won(differences: np.ndarray) -> np.ndarray:
    """1 for positive differences, 0.5 for 0, 0 for negative ones; of any shape."""
    return (np.sign(differences) + 1) / 2


def cluster_means(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Means over the rows of each cluster.

    Args:
        values: `[N, K]`, N at least 1.
        clusters: `[N]`, the number (from 0 on) of the cluster that a row belongs to, e.g. its prompt.

    Returns:
        float64 `[C, K]`, in the order of the C different numbers.
    """
    sums, sizes = _cluster_sums(values, clusters)
    return sums / sizes[:, None]


def _cluster_sums(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(clusters, kind="stable")
    starts = np.flatnonzero(np.diff(np.asarray(clusters)[order], prepend=-1))
    sums = np.add.reduceat(np.asarray(values, np.float64)[order], starts, axis=0)
    return sums, np.diff(starts, append=len(order))


def bootstrap_interval(
    values: np.ndarray, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """`bootstrap_intervals` of one quantity: values `[N]`, one per prompt."""
    columns = np.asarray(values, np.float64)[:, None]
    low, high = bootstrap_intervals(columns, resamples=resamples, confidence=confidence, seed=seed)[:, 0]
    return float(low), float(high)


def bootstrap_intervals(
    values: np.ndarray, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> np.ndarray:
    """Percentile bootstrap intervals of means over prompts (Efron, 1979).

    All quantities share the resamples: how often each prompt was drawn, times the values, is one matrix product.

    Args:
        values: `[N, K]`, K quantities of each prompt.
        resamples: number of samples of N prompts, drawn with replacement.
        confidence: share of the resampled means within the interval.
        seed: of the resampling.

    Returns:
        Lower and upper ends, float64 `[2, K]`.
    """
    values, rng = np.asarray(values, np.float64), np.random.default_rng(seed)
    count, centre = len(values), values.mean(axis=0)
    centred = values - centre  # so that what is the same for all prompts has an interval of width 0, without rounding
    sums = np.concatenate([counts @ centred for counts in _resamples(rng, count, resamples)])
    return centre + np.quantile(sums / count, _ends(confidence), axis=0)


def ratio_intervals(
    strata: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> np.ndarray:
    """Percentile bootstrap intervals of means over prompts that have different numbers of values.

    The quantity is the mean over the strata of the sum of all values by their number. The prompts of each stratum are
    resampled by themselves, so that none is ever empty; a stratum of a single prompt is constant.

    Args:
        strata: (sums, counts) of each: `[N, K]`, of the values of each of N prompts, and `[N]`, how many there are;
            positive. N differs between strata, K does not.
        resamples: number of samples of N prompts, drawn with replacement.
        confidence: share of the resampled means within the interval.
        seed: of the resampling.

    Returns:
        Lower and upper ends, float64 `[2, K]`.
    """
    rng, centre, means = np.random.default_rng(seed), 0.0, 0.0
    for sums, counts in strata:
        mean = sums.sum(axis=0) / counts.sum()
        centred = np.column_stack([sums - mean * counts[:, None], counts])
        drawn = np.concatenate([often @ centred for often in _resamples(rng, len(counts), resamples)])
        centre, means = centre + mean / len(strata), means + drawn[:, :-1] / drawn[:, -1:] / len(strata)
    return centre + np.quantile(means, _ends(confidence), axis=0)


def _resamples(rng: np.random.Generator, count: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each of `count` is drawn in each resample, float64 `[R, count]`, in parts of R that fit into memory.

    Of few parts, as threads meet after each matrix product.
    """
    part = max(1, 2**21 // count)
    for start in range(0, resamples, part):
        drawn = rng.integers(count, size=(min(part, resamples - start), count))
        places = drawn + count * np.arange(len(drawn))[:, None]
        yield np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)


def _ends(confidence: float) -> list[float]:
    return [(1 - confidence) / 2, (1 + confidence) / 2]


def share_interval(
    chosen: np.ndarray, clusters: np.ndarray, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> tuple[float | None, float | None]:
    """Percentile bootstrap interval of the share of rows that are chosen; clusters of rows are drawn whole.

    Args:
        chosen: bool `[N]`.
        clusters: `[N]`, the number (from 0 on) of the cluster that a row belongs to, e.g. its prompt.
        resamples: number of samples of as many clusters, drawn with replacement.
        confidence: share of the resampled shares within the interval.
        seed: of the resampling.

    Returns:
        Its ends; None and None for a single cluster.
    """
    sums, sizes = _cluster_sums(np.asarray(chosen, np.float64)[:, None], clusters)
    if len(sizes) < 2:
        return None, None
    rng, shares = np.random.default_rng(seed), []
    part = max(1, 2**21 // len(sizes))
    for start in range(0, resamples, part):
        drawn = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), min(part, resamples - start))
        shares.append((drawn @ sums[:, 0]) / (drawn @ sizes))
    low, high = np.quantile(np.concatenate(shares), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=16)  # of one page: all its intervals are of few numbers of runs and prompts
def _shares(count: int, resamples: int, seed: int, of: str) -> np.ndarray:
    """How often each of `count` is drawn in each resample, as shares, `[resamples, count]`; of names what is drawn."""
    rng = np.random.default_rng([seed, *of.encode()])
    return rng.multinomial(count, np.full(count, 1 / count), resamples) / count


def crossed_interval(
    values: np.ndarray,
    minus: np.ndarray | None = None,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Pigeonhole bootstrap interval of a mean over runs and prompts, each run on every prompt (Owen, 2007).

    Runs and prompts are drawn with replacement, independently of each other, so that the interval is about other runs
    and other prompts. With a single run it is about other prompts only; with few runs it is rather too narrow.

    Args:
        values: `[R, N]`, of R runs on N prompts.
        minus: `[R, M]`, of the same runs on M other prompts; the interval is that of the difference of the means.
        resamples: number of samples.
        confidence: share of the resampled means within the interval.
        seed: of the resampling.
    """
    runs = _shares(len(values), resamples, seed, "runs")
    centre, means = 0.0, np.zeros(resamples)
    for sign, part, name in ((1, values, "prompts"), (-1, minus, "other prompts")):
        if part is not None:
            part = np.asarray(part, np.float64)
            centre += sign * part.mean()
            prompts = _shares(part.shape[1], resamples, seed, name)
            means += sign * ((runs @ (part - part.mean())) * prompts).sum(axis=1)
    low, high = centre + np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of the sign test: how likely so uneven a split is where wins and losses are equally likely.

    Exact, from the binomial distribution in whole numbers; ties do not count.
    """
    trials, term, tail = wins + losses, 1, 1
    for k in range(min(wins, losses)):
        term = term * (trials - k) // (k + 1)  # binomial coefficients, one from the other
        tail += term
    return min(1.0, 2 * tail / 2**trials)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method (Holm, 1979), in the order given."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def pairwise_distances(embeddings: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Mean cosine distance, 1 - cos, over all pairs of a cluster: how different the images of a prompt are.

    Args:
        embeddings: `[N, D]`, finite and not 0; of any length, only their directions count.
        clusters: `[N]`, the number (from 0 on) of the cluster that a row belongs to; each has at least 2.

    Returns:
        float64 `[C]`, in the order of the C different numbers.
    """
    units = np.asarray(embeddings, np.float64)
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    sums, sizes = _cluster_sums(units, clusters)
    # The square of the sum of n unit vectors is n plus twice the sum of the cosines of all pairs.
    cosines = (np.square(sums).sum(axis=1) - sizes) / (sizes * (sizes - 1))
    return np.maximum(1 - cosines, 0)


NEAR = 0.95  # cosine from which two images of a prompt are near-duplicates


def near_duplicates(embeddings: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Share of the pairs of a cluster whose cosine is at least `NEAR`: how often a prompt shows the same image again.

    Args:
        embeddings: `[N, D]`, finite and not 0; of any length, only their directions count.
        clusters: `[N]` sorted numbers of the clusters that rows belong to; each has at least 2.

    Returns:
        float64 `[C]`, in the order of the C different numbers.
    """
    units = np.asarray(embeddings, np.float64)
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    parts = np.split(units, np.flatnonzero(np.diff(clusters)) + 1)
    return np.array([np.mean((part @ part.T)[np.triu_indices(len(part), 1)] >= NEAR) for part in parts])
