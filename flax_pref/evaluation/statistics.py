"""Paired statistics: two methods drew an image of each prompt from the same noise, and every prompt counts once."""

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
    return (np.sign(gains(scores, baseline)) + 1) / 2


def bootstrap_interval(
    values: np.ndarray, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over prompts (Efron, 1979).

    Args:
        values: `[N]`, one per prompt.
        resamples: number of samples of N prompts, drawn with replacement.
        confidence: share of the resampled means within the interval.
        seed: of the resampling.
    """
    values, rng = np.asarray(values, np.float64), np.random.default_rng(seed)
    # In parts, so that tens of thousands of prompts fit into memory.
    part = max(1, 2**24 // len(values))
    means = [
        values[rng.integers(len(values), size=(min(part, resamples - start), len(values)))].mean(axis=1)
        for start in range(0, resamples, part)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
