import itertools
import re

import numpy as np
import pytest
from guidance_rules import RULES, S

from flax_pref.diffusion.guidance import (
    Rule,
    Schedule,
    cfg,
    cpgd,
    cpgd_conditional,
    merge_weights,
    npo,
    parse_strengths,
    pgd,
    tabulate,
)

NETWORKS, PROMPTS = ("base", "dpo", "pos", "neg"), ("empty", "text", "proxy")
# A scalar "prediction" for every network and prompt: what a rule makes of them is its formula.
EPS = {pair: i + 0.5 for i, pair in enumerate(itertools.product(NETWORKS, PROMPTS))}


def guided(table):
    """What the table makes of EPS in each step for each image, `[S, N]`."""
    predictions = np.array([EPS[row] for row in table.rows])
    total = table.steady + (table.w[:, :, None] * table.contrast).sum(axis=1)
    return np.einsum("srn,r->sn", total, predictions)


def rows_of(table):
    """The rows that each step evaluates."""
    return [[table.rows[r] for r in plan.rows] for plan in table.plans]


def layout(table):
    return table.rows, table.plans


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_its_formula(name, w):
    rule, formula = RULES[name]
    table = tabulate(rule(w, S), 2, 3)
    np.testing.assert_allclose(guided(table), formula(lambda *row: EPS[row], w, S), rtol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_strengths_may_differ_between_steps_and_images(name):
    rule, formula = RULES[name]
    w, s = np.float64([0, 1, 4]), np.float64([1, 7.5, 3])
    table = tabulate(rule(w, Schedule((s, 2 * s), "linear")), 5, 3)
    at = s * np.linspace(1, 2, 5)[:, None]
    np.testing.assert_allclose(guided(table), formula(lambda *row: EPS[row], w, at) + 0 * at, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(guided(table.images([2, 0])), guided(table)[:, [2, 0]])


def test_rows_of_one_network_are_neighbours_with_the_base_first():
    two = PROMPTS[:2]
    assert tabulate(cpgd(2.0, S), 1, 1).rows == tuple(itertools.product(("base", "pos", "neg"), two))
    assert tabulate(pgd(2.0, S, "tailorpo"), 1, 1).rows == tuple(itertools.product(("base", "tailorpo"), two))


@pytest.mark.parametrize(("name", "rows"), [("cfg", 2), ("pgd", 4), ("cpgd", 6), ("cpgd conditional", 4), ("npo", 2)])
def test_a_rule_costs_as_many_predictions_as_its_formula_has(name, rows):
    assert tabulate(RULES[name][0](2.0, S), 10, 1).evaluations == 10 * rows


@pytest.mark.parametrize("name", RULES)
def test_the_layout_does_not_depend_on_strengths(name):
    strengths = [0, 0.5, 2.5, -1.0, [0.0, 3.0], Schedule((0, 2), "linear"), Schedule((1, 0), "cosine")]
    strengths += [Schedule((0, 0, 1, 2), "list")]
    layouts = {layout(tabulate(RULES[name][0](w, s), 4, 2)) for w in [*strengths, 1] for s in strengths}
    assert len(layouts) == 1
    kept = {layout(tabulate(RULES[name][0](w, 1), 4, 2, keep_unguided=True)) for w in strengths}
    assert kept == layouts


@pytest.mark.parametrize("s", [1, 1.0, [1.0, 1.0], Schedule((1, 1), "linear")])
def test_a_guidance_scale_of_one_throughout_predicts_no_empty_prompt(s):
    for rule in (cfg(s), pgd(2.0, s), cpgd(2.0, s)):
        table = tabulate(rule, 4, 2)
        assert {table.rows[r][1] for plan in table.plans for r in plan.rows} == {"text"}


def test_a_network_that_is_named_twice_is_predicted_once():
    table = tabulate(cpgd(3.0, S, "pos", "pos"), 1, 1)
    assert table.rows == (("base", "empty"), ("base", "text"), ("pos", "empty"), ("pos", "text"))
    np.testing.assert_array_equal(table.contrast, np.zeros((1, 1, 4, 1)))
    assert rows_of(tabulate(cpgd(2.0, S, "pos", "base"), 1, 1)) == [
        [("base", "empty"), ("base", "text"), ("pos", "empty"), ("pos", "text")]
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule((4,)), [4, 4, 4, 4, 4]),
        (Schedule((8, 0), "linear"), [8, 6, 4, 2, 0]),
        (Schedule((0, 8), "cosine"), [0, 8 * (1 - 0.5**0.5) / 2, 4, 8 * (1 + 0.5**0.5) / 2, 8]),
        (Schedule((1, 2, 3, 4, 5), "list"), [1, 2, 3, 4, 5]),
        (Schedule((4,), start=0.2, stop=0.8), [-1, 4, 4, 4, -1]),
        (Schedule((1, 3), "linear", stop=0.6), [1, 2, 3, -1, -1]),
        (Schedule((1, 2, 3, 4, 5), "list", start=0.8), [-1, -1, -1, -1, 5]),
        (Schedule((1, 3), "linear", start=0.6, stop=0.7), [-1, -1, -1, 1, -1]),
    ],
)
def test_a_schedule_takes_its_course_between_its_ends(schedule, expected):
    np.testing.assert_allclose(schedule.at(5, off=-1)[:, 0], expected, atol=1e-12)


def test_an_end_at_a_step_does_not_hang_on_rounding():
    for steps in range(1, 60):
        for i in range(steps):
            active = Schedule((1,), start=i / steps).active(steps)
            assert active.sum() == steps - i
            assert Schedule((1,), start=i / steps, stop=(i + 1) / steps).active(steps).sum() == 1


def test_outside_of_its_interval_a_module_is_not_evaluated():
    table = tabulate(cpgd(Schedule((4,), start=0.2, stop=0.6), S), 5, 1)
    assert [len(rows) for rows in rows_of(table)] == [2, 6, 6, 2, 2]
    assert {network for rows in (rows_of(table)[0], rows_of(table)[4]) for network, _ in rows} == {"base"}
    base = tabulate(cfg(S), 5, 1)
    np.testing.assert_allclose(guided(table)[[0, 3, 4]], guided(base)[[0, 3, 4]], rtol=1e-5)


def test_outside_of_the_interval_of_the_guidance_scale_the_empty_prompt_is_not_evaluated():
    off = Schedule((S,), start=0.5)
    assert rows_of(tabulate(cfg(off), 2, 1)) == [[("base", "text")], [("base", "empty"), ("base", "text")]]
    assert [len(rows) for rows in rows_of(tabulate(cpgd(2.0, off), 4, 1))] == [3, 3, 6, 6]
    assert [len(rows) for rows in rows_of(tabulate(npo(off), 4, 1))] == [1, 1, 2, 2]
    # Without guidance a prediction is that of the prompt.
    np.testing.assert_allclose(guided(tabulate(cfg(off), 2, 1))[0], EPS["base", "text"])


@pytest.mark.parametrize("text", ["4", "linear:8:0", "cosine:0:8@0.2:0.8", "list:1:2:3", "constant:4@0:0.5", "-1.5"])
def test_a_strength_can_be_typed(text):
    schedule = Schedule.parse(text)
    assert schedule.at(3, off=0).shape == (3, 1)
    assert (schedule.start, schedule.stop) == {"@": (0.2, 0.8), "5": (0.0, 0.5)}.get(
        "@" if "@0.2" in text else text[-1] if "@" in text else "", (0.0, 1.0)
    )


def test_several_strengths_can_be_typed_by_name():
    parsed = parse_strengths("pos=3, neg=linear:0:2@0.2:0.8")
    assert parsed["pos"] == Schedule((3.0,)) and parsed["neg"] == Schedule((0.0, 2.0), "linear", 0.2, 0.8)
    assert parse_strengths("4") == Schedule((4.0,))
    for text in ("pos=3,1", "=3", "pos=1,pos=2", "pos=four"):
        with pytest.raises(ValueError, match=re.escape(text) if text != "pos=four" else "'four' is no strength"):
            parse_strengths(text)
    with pytest.raises(ValueError, match="w has strengths for pos; this rule expects one for each of pos, neg"):
        cpgd({"pos": 3.0}, S)
    assert merge_weights(cpgd({"pos": 3.0, "neg": 1.0}, S)) == {"pos": 3.0, "base": -2.0, "neg": -1.0}


@pytest.mark.parametrize("text", ["", "four", "linear:1", "cubic:1:2", "4@", "4@0.5", "4@0.8:0.2", "4@0:2", "list:"])
def test_a_strength_that_is_none_is_refused_with_what_would_be_one(text):
    with pytest.raises(ValueError, match=r"is no strength .* expected a number, linear:FIRST:LAST"):
        Schedule.parse(text)


# ----------------------------------------------------------------------------------------------------------------------
# Reuse of the contrast


def test_the_contrast_is_predicted_in_every_so_many_steps():
    table = tabulate(cpgd(2.0, S, every=3), 8, 1)
    assert [plan.contrast for plan in table.plans] == ["new", "reused", "reused"] * 2 + ["new", "reused"]
    assert [len(plan.rows) for plan in table.plans] == [6, 2, 2] * 2 + [6, 2]
    assert table.evaluations == 3 * 6 + 5 * 2
    np.testing.assert_array_equal(table.extrapolation, np.zeros((8, 1)))


def test_in_an_interval_the_first_step_predicts_the_contrast():
    table = tabulate(cpgd_conditional(Schedule((2.0,), start=0.25, stop=0.75), S, every=2), 8, 1)
    assert [plan.contrast for plan in table.plans] == ["none"] * 2 + ["new", "reused"] * 2 + ["none"] * 2
    assert [len(plan.rows) for plan in table.plans] == [2, 2, 4, 2, 4, 2, 2, 2]


def test_extrapolation_goes_on_from_two_predictions():
    table = tabulate(cpgd(2.0, S, every=3, between="extrapolate"), 9, 1)
    np.testing.assert_allclose(table.extrapolation[:, 0], [0, 0, 0, 0, 1 / 3, 2 / 3, 0, 1 / 3, 2 / 3], rtol=1e-6)


def test_a_contrast_that_was_not_predicted_before_is_held():
    w = {"pos": Schedule((3.0,), stop=0.5), "neg": Schedule((1.0,), start=0.5)}
    table = tabulate(cpgd(w, S, every=2, between="extrapolate"), 8, 1)
    used_again = table.extrapolation[1::2]
    np.testing.assert_array_equal(used_again, [[0, 0], [0.5, 0], [0.5, 0], [0, 0.5]])


def test_a_rule_without_contrast_has_nothing_to_reuse():
    assert {plan.contrast for plan in tabulate(cfg(S, every=3), 6, 1).plans} == {"none"}


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_strengths_that_are_not_finite_are_refused_by_name(bad):
    for rule in (pgd, cpgd):
        for value in (bad, [1.0, bad], Schedule((0, bad), "linear")):
            with pytest.raises(ValueError, match=f"^w must be finite, got {bad}$"):
                rule(value, S)
            with pytest.raises(ValueError, match=f"^guidance_scale must be finite, got {bad}$"):
                rule(1.0, value)
    with pytest.raises(ValueError, match=f"^rescale must be finite, got {bad}$"):
        cfg(S, rescale=bad)
    with pytest.raises(ValueError, match=r"coefficient of \(pos, empty\) must be finite"):
        tabulate(cpgd(1e30, 1e30), 1, 1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="w has 3 values for 2 images; expected one, or one for each"):
        tabulate(cpgd([1.0, 2.0, 3.0], S), 4, 2)
    with pytest.raises(ValueError, match=r"a list of 3 values for 4 steps of the solver.*pndm takes one step more"):
        tabulate(cpgd(Schedule((1, 2, 3), "list"), S), 4, 2)
    with pytest.raises(ValueError, match=r"expected 0 <= start < stop <= 1, got start=0.5, stop=0.5"):
        Schedule((1,), start=0.5, stop=0.5)
    with pytest.raises(ValueError, match="every=0 must be a whole number from 1 up"):
        cpgd(1.0, S, every=0)
    with pytest.raises(ValueError, match=r"rescale must lie in 0 .. 1, got 1.5"):
        cfg(S, rescale=1.5)
    with pytest.raises(TypeError):
        Rule(cfg(S).formula)


def test_a_rule_says_which_networks_it_needs():
    assert cpgd(1.0, S).networks() == ("base", "pos", "neg")
    assert npo(S).networks() == ("neg", "pos")
    assert pgd(1.0, S, "ft", reference="own").networks() == ("base", "ft", "own")
