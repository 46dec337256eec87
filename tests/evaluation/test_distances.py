"""Distances between sets of images against scipy, closed forms and loops over pairs, in float64."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from flax_pref.evaluation.distances import (
    Moments,
    cmmd,
    frechet_distance,
    kernel_distance,
    moments,
    precision_recall,
    vendi_score,
)
from flax_pref.evaluation.set_measures import Reference, set_notes, set_rows
from flax_pref.evaluation.statistics import share_interval


def drawn(count, length, *, seed=0, shift=0.0):
    """Correlated features."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, length)) @ np.random.default_rng(9).normal(size=(length, length)) + shift


@pytest.mark.parametrize("counts", [(200, 150), (7, 150), (7, 5)])  # fewer images than the 20 features too
def test_the_frechet_distance_is_that_of_the_root_by_scipy(counts):
    x, y = drawn(counts[0], 20), drawn(counts[1], 20, seed=1, shift=0.3)
    one, other = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # Of singular matrices scipy has no root: that of slightly larger ones is near it.
    root = sqrtm((one + 1e-10 * np.eye(20)) @ (other + 1e-10 * np.eye(20))).real
    wanted = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(one + other - 2 * root)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(wanted, rel=1e-4)
    assert frechet_distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-8 * np.trace(one))


def test_the_frechet_distance_of_normal_distributions_on_the_same_axes_is_their_closed_form():
    one = Moments(np.array([0.0, 1.0]), np.diag([4.0, 9.0]))
    other = Moments(np.array([3.0, 1.0]), np.diag([1.0, 0.0]))
    assert frechet_distance(one, other) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 0) ** 2, rel=1e-12)
    with pytest.raises(ValueError, match="features of 2 and of 3 numbers cannot be compared"):
        frechet_distance(one, Moments(np.zeros(3), np.eye(3)))
    with pytest.raises(ValueError, match="at least 2 images, and there are 1"):
        moments(np.zeros((1, 3)))


def loop(x, y, kernel, *, diagonal):
    """Mean of a kernel over pairs, one after another."""
    values = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(y) if diagonal or i != j]
    return sum(values) / len(values)


def test_kid_is_the_unbiased_estimate_over_all_pairs(monkeypatch):
    monkeypatch.setattr("flax_pref.evaluation.distances.ROWS", 5)
    x, y = drawn(12, 6), drawn(9, 6, seed=1)

    def kernel(a, b):
        return (a @ b / 6 + 1) ** 3

    wanted = loop(x, x, kernel, diagonal=False) + loop(y, y, kernel, diagonal=False)
    wanted -= 2 * loop(x, y, kernel, diagonal=True)
    assert kernel_distance(x, y) == pytest.approx(wanted, rel=1e-12)


def test_kid_has_no_bias_where_fid_has():
    """Of two sets from one distribution: on average KID is zero and FID is not."""
    pairs = [(drawn(15, 8, seed=2 * i), drawn(15, 8, seed=2 * i + 1)) for i in range(200)]
    kids = np.array([kernel_distance(x, y) for x, y in pairs])
    assert abs(kids.mean()) < 3 * kids.std() / np.sqrt(len(kids))
    assert min(frechet_distance(moments(x), moments(y)) for x, y in pairs) > 1


def test_cmmd_is_that_of_a_loop_over_all_pairs(monkeypatch):
    monkeypatch.setattr("flax_pref.evaluation.distances.ROWS", 4)
    x, y = drawn(11, 6), drawn(7, 6, seed=1)

    def kernel(a, b):
        return np.exp(-np.square(a - b).sum() / (2 * 10**2))

    wanted = loop(x, x, kernel, diagonal=True) + loop(y, y, kernel, diagonal=True)
    wanted -= 2 * loop(x, y, kernel, diagonal=True)
    assert cmmd(x, y) == pytest.approx(1000 * wanted, rel=1e-9)
    assert cmmd(x, x[::-1]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_are_those_of_a_loop_over_the_balls(neighbours, monkeypatch):
    monkeypatch.setattr("flax_pref.evaluation.distances.ROWS", 7)
    x, y = drawn(30, 4), drawn(20, 4, seed=1, shift=1.5)

    def among(points, others):
        radii = [sorted(np.linalg.norm(a - b) for b in others)[neighbours] for a in others]
        return [any(np.linalg.norm(p - b) <= r for b, r in zip(others, radii, strict=True)) for p in points]

    inside, covered = precision_recall(x, y, neighbours=neighbours)
    assert inside.tolist() == among(x, y) and covered.tolist() == among(y, x)
    assert 0 < inside.mean() < 1 and 0 < covered.mean() < 1
    assert np.all(precision_recall(x, x)[0])
    with pytest.raises(ValueError, match="3 neighbours need more images than there are, 3"):
        precision_recall(x[:3], y)


@pytest.mark.parametrize("count", [3, 40])  # fewer than the 10 features, and more
def test_the_vendi_score_is_the_entropy_of_the_cosines(count):
    x = drawn(count, 10)
    cosines = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in x] for a in x])
    values = np.linalg.eigvals(cosines / count).real.clip(1e-300)
    assert vendi_score(x) == pytest.approx(np.exp(-np.sum(values * np.log(values))), rel=1e-9)


def test_the_vendi_score_counts_images_that_have_nothing_in_common():
    assert vendi_score(np.eye(5)) == pytest.approx(5)
    assert vendi_score(np.repeat(np.eye(5), 3, axis=0)) == pytest.approx(5)
    assert vendi_score(np.ones((4, 7))) == pytest.approx(1)


def test_the_interval_of_a_share_is_that_of_a_loop_over_resamples_of_prompts():
    chosen, clusters = np.arange(40) % 3 == 0, np.repeat(np.arange(10), [1, 7] * 5)
    rng, shares = np.random.default_rng(1), []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(clusters == c) for c in rng.integers(10, size=10)])
        shares.append(chosen[rows].mean())
    low, high = share_interval(chosen, clusters)
    np.testing.assert_allclose([low, high], np.quantile(shares, [0.025, 0.975]), atol=0.02)
    assert share_interval(chosen, np.zeros(40, int)) == (None, None)


def test_rows_have_the_measures_of_their_features_and_say_how_many_images_they_are_of():
    mine, others = drawn(12, 20), drawn(30, 20, seed=1)
    features = {name: {"base": mine} for name in ("inception", "dinov2", "cmmd", "pickscore")}
    reference = Reference("photos", {name: others for name in ("inception", "dinov2", "cmmd")}, {})
    rows = set_rows(features, dict.fromkeys(features, np.arange(12) // 2), reference)
    found = {(row["features"], row["measure"]): row for row in rows}
    assert list(found) == [
        *(("inception", name) for name in ("Vendi score", "FID", "KID", "precision", "recall")),
        *(("dinov2", name) for name in ("Vendi score", "FD", "precision", "recall")),
        *(("cmmd", name) for name in ("Vendi score", "CMMD")),
        ("pickscore", "Vendi score"),
    ]
    row = found["inception", "FID"]
    assert row["value"]["value"] == frechet_distance(moments(mine), moments(others)) and row["value"]["low"] is None
    assert (row["images"], row["reference_images"]) == (12, 30)
    precision = found["dinov2", "precision"]["value"]
    assert precision["value"] == precision_recall(mine, others)[0].mean()
    assert precision["low"] <= precision["value"] <= precision["high"]
    notes = " ".join(set_notes(rows, reference))
    assert "FID is biased upwards where images are few" in notes and "here 12 against 30 of the reference" in notes
    assert "12 images are too few for the covariance of 20 features, whose rank is 11 at most" in notes
    # Of statistics there is FID and nothing else, and it is not known of how many images.
    only = Reference("stats.npz", {}, {"inception": moments(others)._replace(images=None)})
    rows = set_rows(features, dict.fromkeys(features, np.arange(12) // 2), only)
    assert [row["measure"] for row in rows if row["features"] == "inception"] == ["Vendi score", "FID"]
    absent, bias, *_ = set_notes(rows, only)
    assert absent == "KID, precision, recall of inception left out: the reference is a file of statistics."
    assert "against an unknown number of the reference" in bias
    # Of too few images a measure is left out, none fails, and it is told.
    one = set_rows({"inception": {"base": mine[:1]}}, {"inception": np.zeros(1, int)}, reference)
    assert [row["measure"] for row in one] == ["Vendi score"]
    assert set_notes(one, reference) == [
        "FID, KID, precision, recall of inception left out: 1 images and 30 of the reference; expected 2 for FID, "
        "2 for KID, 4 for precision, 4 for recall."
    ]
