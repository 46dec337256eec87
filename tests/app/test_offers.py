"""Which rules a page offers, by the modules that are loaded."""

import pytest

from flax_pref.app.app_flags import AppFlags
from flax_pref.app.offers import ABOUT, first_offer, offered
from flax_pref.config import UserError
from flax_pref.diffusion.rules import RULES

PAIR = ["fine_tuned (pos)", "fine_tuned (neg)", "pgd (pos)", "pgd (neg)", "cpgd", "cpgd_conditional", "positive_only",
        "negative_only", "npo", "chats", "multi"]  # fmt: skip


@pytest.mark.parametrize(
    ("modules", "labels", "first"),
    [
        ((), ["cfg"], "cfg"),
        (("dpo",), ["cfg", "fine_tuned", "pgd"], "pgd"),
        (("bad",), ["cfg", "fine_tuned", "pgd", "autoguidance"], "pgd"),
        (("pos", "neg"), ["cfg", *PAIR], "cpgd"),
    ],
)
def test_only_rules_that_the_modules_allow_are_offered(modules, labels, first):
    flags = AppFlags(model="demo")
    offers = offered(modules, flags)
    assert [offer.label for offer in offers] == labels
    assert first_offer(offers, flags).label == first
    for offer in offers:
        assert set(offer.modules) <= set(modules) and offer.about


def test_every_rule_is_described():
    assert set(ABOUT) == set(RULES)


def test_a_rule_of_the_flags_comes_first_or_says_what_it_lacks():
    flags = AppFlags(model="demo", rule="npo")
    assert first_offer(offered(["pos", "neg"], flags), flags).label == "npo"
    with pytest.raises(
        ValueError, match=r"--rule npo: needs modules .* expected --module NAME=PATH for each, or one of"
    ):
        first_offer(offered(["dpo"], flags), flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"merge": True, "rule": "cpgd", "w": "4"}, "--merge: weights hold one w"),
        ({"preset": "fast"}, "--preset fast: merges one w"),
        ({"preset": "late"}, "--preset late: needs --w"),
        ({"port": 0}, "--port 0: expected 1 to 65535"),
    ],
)
def test_flags_that_a_page_has_no_use_for_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        AppFlags(model="demo", **flags)
