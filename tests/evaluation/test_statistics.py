import itertools
import time

import numpy as np
import pytest
from scipy.stats import binomtest

from flax_pref.evaluation.statistics import (
    bootstrap_interval,
    bootstrap_intervals,
    cluster_means,
    gains,
    holm,
    pairwise_distances,
    ratio_intervals,
    sign_test,
    wins,
)


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


def test_many_intervals_at_once_are_those_of_a_plain_loop():
    values = np.random.default_rng(0).normal([0.0, 100.0, -3.0], [1.0, 0.1, 50.0], (37, 3))
    rng = np.random.default_rng(5)
    means = np.stack([values[rng.integers(37, size=37)].mean(axis=0) for _ in range(600)])
    expected = np.quantile(means, [0.05, 0.95], axis=0)
    found = bootstrap_intervals(values, resamples=600, confidence=0.9, seed=5)
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    for column in range(3):
        single = bootstrap_interval(values[:, column], resamples=600, confidence=0.9, seed=5)
        np.testing.assert_allclose(single, expected[:, column], rtol=1e-13)


def test_the_intervals_of_3200_prompts_under_4_methods_and_3_rewards_take_less_than_a_second():
    values = np.random.default_rng(0).normal(size=(3200, 36))

    def seconds():
        begun = time.process_time()
        bootstrap_intervals(values)
        return time.process_time() - begun

    assert any(seconds() < 1 for _ in range(20))  # others may be using the machine, for a while


def test_a_prompt_counts_once_whatever_its_number_of_seeds():
    clusters = np.array([2, 0, 2, 2, 5, 0])
    values = np.array([[1.0, 10], [4, 40], [2, 20], [6, 60], [7, 70], [5, 50]])
    np.testing.assert_array_equal(cluster_means(values, clusters), [[4.5, 45], [3, 30], [7, 70]])


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (9, 1), (3, 17), (700, 900), (1500, 1700)])
def test_the_sign_test_is_the_exact_binomial_one(wins, losses):
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)
    assert sign_test(losses, wins) == sign_test(wins, losses)


def test_the_sign_test_of_thousands_of_wins_does_not_overflow():
    assert sign_test(100_000, 0) == 0 and 0 < sign_test(1000, 0) < 1e-300


def test_p_values_are_corrected_by_holm_in_the_order_given():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1, 1] and holm([0.3]) == [0.3] and holm([]) == []


def test_distances_are_the_mean_over_all_pairs_of_a_prompt():
    rng = np.random.default_rng(0)
    embeddings, clusters = rng.normal(0.3, 1, (9, 5)), np.array([0, 0, 1, 1, 1, 1, 4, 4, 4])
    expected = []
    for cluster in (0, 1, 4):
        pairs = itertools.combinations(embeddings[clusters == cluster], 2)
        expected.append(np.mean([1 - a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs]))
    order = rng.permutation(9)
    found = pairwise_distances(3 * embeddings[order], clusters[order])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert pairwise_distances(np.ones((3, 4)), np.zeros(3, int)) == pytest.approx([0], abs=1e-12)


def test_ratios_of_as_many_values_of_each_prompt_have_the_intervals_of_means():
    values = np.random.default_rng(0).normal(size=(30, 2))
    np.testing.assert_allclose(
        ratio_intervals([(3 * values, np.full(30, 3.0))]), bootstrap_intervals(values), rtol=1e-9
    )
    same = ratio_intervals([(np.full((5, 1), 2.0), np.full(5, 4.0))])
    np.testing.assert_allclose(same, 0.5, atol=1e-12)


def test_a_ratio_is_resampled_by_prompts_within_each_stratum():
    rng = np.random.default_rng(1)
    strata = []
    for n in (6, 40):
        counts = rng.integers(1, 5, n).astype(float)
        strata.append((counts[:, None] * rng.random((n, 1)), counts))
    low, high = ratio_intervals(strata)[:, 0]
    means = []
    for _ in range(10_000):
        drawn = [rng.integers(len(counts), size=len(counts)) for _, counts in strata]
        ratios = [sums[i].sum() / counts[i].sum() for (sums, counts), i in zip(strata, drawn, strict=True)]
        means.append(np.mean(ratios))
    np.testing.assert_allclose([low, high], np.quantile(means, [0.025, 0.975]), atol=0.01)
