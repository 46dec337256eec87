import itertools

import numpy as np
import pytest

from flax_pref.diffusion.guidance import Row, cfg, coefficients, cpgd, layout, pgd

S = 7.5
NETWORKS, PROMPTS = ("base", "dpo", "pos", "neg"), ("empty", "text")
# A scalar "prediction" for every network and prompt: what a rule makes of them is its formula.
EPS = {pair: i + 0.5 for i, pair in enumerate(itertools.product(NETWORKS, PROMPTS))}


def guided(rows):
    return sum(row.coefficient * EPS[row.network, row.prompt] for row in rows)


def classifier_free(network):
    return (1 - S) * EPS[network, "empty"] + S * EPS[network, "text"]


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0, 10.0])
def test_rules_are_the_formulas_of_the_paper(w):
    base, dpo, pos, neg = map(classifier_free, NETWORKS)
    np.testing.assert_allclose(guided(cfg(S, "dpo")), dpo)
    np.testing.assert_allclose(guided(pgd(w, S)), (1 - w) * base + w * dpo)
    np.testing.assert_allclose(guided(cpgd(w, S)), base + w * (pos - neg))
    np.testing.assert_allclose(guided(cpgd(w, S, negative="base")), base + w * (pos - base), rtol=1e-6)


def test_rows_of_one_network_are_neighbours_with_the_base_first():
    assert layout(cpgd(2.0, S)) == tuple(itertools.product(("base", "pos", "neg"), PROMPTS))
    assert layout(pgd(2.0, S, fine_tuned="tailorpo")) == tuple(itertools.product(("base", "tailorpo"), PROMPTS))


@pytest.mark.parametrize("rule", [pgd, cpgd])
def test_the_layout_does_not_depend_on_strengths(rule):
    assert len({layout(rule(w, s)) for w in (0, 1, 2.5) for s in (0, 1, 7.5)}) == 1
    hash(layout(rule(1, 1)))


def test_a_network_that_is_named_twice_is_predicted_once():
    assert layout(cpgd(3.0, S, "pos", "pos")) == (
        ("base", "empty"),
        ("base", "text"),
        ("pos", "empty"),
        ("pos", "text"),
    )
    np.testing.assert_array_equal(coefficients(cpgd(3.0, S, "pos", "pos")), [1 - S, S, 0, 0])
    assert pgd(3.0, S, "base") == cfg(S)


def test_coefficients_follow_the_rows_in_float32():
    got = coefficients((Row("a", "text", 0.1), Row("b", "empty", -2)))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.float32([0.1, -2]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_strengths_that_are_not_finite_are_refused_by_name(bad):
    for rule in (pgd, cpgd):
        with pytest.raises(ValueError, match=f"^w must be finite, got {bad}$"):
            rule(bad, S)
        with pytest.raises(ValueError, match=f"^guidance_scale must be finite, got {bad}$"):
            rule(1.0, bad)
    with pytest.raises(ValueError, match=f"^guidance_scale must be finite, got {bad}$"):
        cfg(bad)
    with pytest.raises(ValueError, match=r"coefficient of \(pos, empty\) must be finite"):
        cpgd(1e200, 1e200)
