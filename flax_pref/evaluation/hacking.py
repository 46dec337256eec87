"""Signs that methods exploit the reward that they were trained on, beside those that they were not."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flax_pref.evaluation.comparison import Items, mean_intervals
from flax_pref.evaluation.statistics import cluster_means


def standardised_gains(items: Items, baseline: str, rewards: Sequence[str]) -> list[dict[str, Any]]:
    """Gains of every method over the baseline by each reward, in standard deviations of the baseline over prompts.

    So rewards of any unit are comparable: a method that gains by the reward it was trained on and not by the others
    has learned the reward's weaknesses rather than what people prefer.

    Args:
        items: of `comparison.pair_runs`.
        baseline: a method.
        rewards: whose gains are wanted.

    Returns:
        rows with method, reward and gain, an interval over prompts; none of a reward that is the same for all of the
        baseline's images, or without finite scores.
    """
    rows = []
    for reward in rewards:
        by = items.scores[reward]
        finite = np.all([np.isfinite(scores) for scores in by.values()], axis=0)
        if not finite.any():
            continue
        others = [method for method in by if method != baseline]
        columns = np.stack([by[baseline][finite], *(by[m][finite] - by[baseline][finite] for m in others)], axis=1)
        means = cluster_means(columns, items.prompts[finite])
        deviation = means[:, 0].std(ddof=1) if len(means) > 1 else 0.0
        if deviation > 0:
            gains = mean_intervals(means[:, 1:] / deviation)
            rows += [{"method": m, "reward": reward, "gain": gain} for m, gain in zip(others, gains, strict=True)]
    return rows
