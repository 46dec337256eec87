import numpy as np
import pytest

from flax_pref.evaluation.statistics import bootstrap_interval, gains, wins


def test_wins_and_gains_are_paired_and_ties_count_one_half():
    scores, baseline = [1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 3.0]
    np.testing.assert_array_equal(wins(scores, baseline), [1, 0.5, 0, 1])
    np.testing.assert_array_equal(gains(scores, baseline), [1, 0, -2, 1])


def test_the_interval_agrees_with_the_normal_one_on_many_prompts():
    values = np.random.default_rng(0).normal(0.3, 2.0, 4000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        low, high = bootstrap_interval(rng.normal(1.0, 1.0, 40), resamples=500)
        covered += low <= 1.0 <= high
    assert 0.90 < covered / 300 < 0.98


def test_the_interval_is_the_same_on_every_run():
    values = np.arange(10.0)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("scores", "baseline", "message"),
    [
        ([1.0], [1.0], "at least 2 prompts"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], r"shapes \[2\] and \[3\]"),
        ([1.0, np.nan], [1.0, 2.0], "prompt 1 is not finite"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(scores, baseline, message):
    with pytest.raises(ValueError, match=message):
        gains(scores, baseline)
