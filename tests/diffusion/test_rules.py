"""Rules by name, and those of the user."""

import numpy as np
import pytest

from flax_pref.diffusion.guidance import Schedule, cpgd, tabulate
from flax_pref.diffusion.rules import RULES, find_rule, named_rule


def same(one, other):
    one, other = (tabulate(rule, 4, 2) for rule in (one, other))
    assert one.rows == other.rows and one.plans == other.plans
    for name in ("steady", "contrast", "w"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("name", RULES)
def test_every_name_makes_a_rule_that_says_whether_it_has_a_strength(name):
    rule = named_rule(name, guidance_scale="3", w="pos=2" if name == "multi" else "2")
    assert tabulate(rule, 4, 1).w.any() == find_rule(name).contrasts


def test_strengths_can_be_typed_for_each_module():
    typed = named_rule("cpgd", guidance_scale="7.5", w="pos=3,neg=linear:0:2@0.2:0.8")
    same(typed, cpgd({"pos": 3.0, "neg": Schedule((0, 2), "linear", 0.2, 0.8)}, 7.5))


OWN = """
from flax_pref.diffusion.guidance import Rule, cfg, cfg_of, eps

def pull(w, guidance_scale, **options):
    return Rule(
        formula=lambda s: (cfg_of("base", s), cfg_of("pos", s) - cfg_of("neg", s)),
        w=w, guidance_scale=guidance_scale, **options,
    )

def plain(guidance_scale, **options):
    return cfg(guidance_scale, **options)

def without_w(guidance_scale, **options):
    return Rule(formula=lambda s: (cfg_of("base", s), cfg_of("pos", s)), guidance_scale=guidance_scale, **options)

def nothing(w, guidance_scale, **options):
    return None

def few_options(w, guidance_scale):
    return cfg(guidance_scale)

def one_part(w, guidance_scale, **options):
    return Rule(formula=lambda s: cfg_of("base", s), w=w, guidance_scale=guidance_scale, **options)

def product(w, guidance_scale, **options):
    return Rule(formula=lambda s: (cfg_of("base", s) * cfg_of("pos", s), cfg_of("neg", s)), w=w, **options)

def shifted(w, guidance_scale, **options):
    return Rule(formula=lambda s: (cfg_of("base", s) + 1.0, cfg_of("neg", s)), w=w, **options)

def misspelt(w, guidance_scale, **options):
    return Rule(formula=lambda s: (eps("base", "txt"), eps("neg", "text")), w=w, **options)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "rules_of_mine.py").write_text(OWN)
    (tmp_path / "unfinished_rules.py").write_text("def pull(w,")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_rule_of_the_users_own_is_used_as_one_of_the_table(own):
    same(named_rule("python:rules_of_mine:pull", guidance_scale=3.0, w="2", every=2), cpgd(2.0, 3.0, every=2))
    assert find_rule("python:rules_of_mine:pull").contrasts
    assert not find_rule("python:rules_of_mine:plain").contrasts
    same(named_rule("python:rules_of_mine:plain", guidance_scale=3.0), named_rule("cfg", guidance_scale=3.0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpgdd", "no rule 'cpgdd'; expected cfg, fine_tuned"),
        ("python:rules_of_mine:without_w", "has a contrast, but its function takes no w and sets none"),
        ("python:rules_of_mine", "or python:MODULE:FUNCTION"),
        ("python:not_there:pull", "cannot import not_there .*set PYTHONPATH"),
        ("python:rules_of_mine:push", "module rules_of_mine has no push"),
        ("python:rules_of_mine:nothing", "returned a NoneType; expected a flax_pref Rule"),
        (
            "python:rules_of_mine:few_options",
            r"unexpected keyword .* expected FUNCTION\(w, guidance_scale, \*\*options\)",
        ),
        ("python:rules_of_mine:one_part", "a rule's formula: cannot unpack .*; expected steady and contrast"),
        ("python:rules_of_mine:product", "a rule's formula: unsupported operand .*sums of eps"),
        ("python:rules_of_mine:shifted", "a rule's formula: 'float' object .*sums of eps"),
        ("python:rules_of_mine:misspelt", r"eps\('base', 'txt'\): no such prompt; expected text, empty, proxy"),
        ("python:unfinished_rules:pull", "rule python:unfinished_rules:pull: .*unfinished_rules.py, line 1"),
    ],
)
def test_a_rule_that_is_not_there_is_named(own, name, message):
    with pytest.raises(ValueError, match=message):
        named_rule(name, guidance_scale=3.0, w=2.0)


def test_a_number_for_a_rule_of_several_strengths_and_names_for_a_rule_of_one_are_told_apart():
    with pytest.raises(ValueError, match="w has strengths for pos, neg; this rule expects a single one, such as 3"):
        named_rule("pgd", guidance_scale=3.0, w="pos=3,neg=1")
    with pytest.raises(ValueError, match="or one for each module by name: pos=3,neg=1"):
        named_rule("cpgd", guidance_scale=3.0, w="3,1")
