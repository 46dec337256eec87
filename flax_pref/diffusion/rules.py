"""Guidance rules by name, with strengths as users write them: a table, and rules of the user's own.

To add a rule, write a function `(w, guidance_scale, **options) -> Rule` in `guidance.py` and its line in `RULES`; or
use one of your own module as it is, with `python:MODULE:FUNCTION`.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from flax_pref.diffusion.guidance import (
    Rule,
    Schedule,
    Strength,
    Strengths,
    autoguidance,
    cfg,
    chats,
    cpgd,
    cpgd_conditional,
    multi,
    npo,
    parse_strengths,
    pgd,
)


class Terms(NamedTuple):
    """What a rule is made of; see `named_rule`."""

    w: Any
    guidance_scale: Any
    module: str
    reference: str
    proxy: float


class NamedRule(NamedTuple):
    """An entry of the table.

    Attributes:
        make: the rule of its terms; options are those of `Rule`.
        contrasts: whether it has a strength w.
    """

    make: Callable[..., Rule]
    contrasts: bool


RULES: dict[str, NamedRule] = {
    "cfg": NamedRule(lambda t, **o: cfg(t.guidance_scale, **o), contrasts=False),
    "fine_tuned": NamedRule(lambda t, **o: cfg(t.guidance_scale, t.module, **o), contrasts=False),
    "pgd": NamedRule(lambda t, **o: pgd(t.w, t.guidance_scale, t.module, reference=t.reference, **o), contrasts=True),
    "cpgd": NamedRule(lambda t, **o: cpgd(t.w, t.guidance_scale, **o), contrasts=True),
    "cpgd_conditional": NamedRule(lambda t, **o: cpgd_conditional(t.w, t.guidance_scale, **o), contrasts=True),
    "positive_only": NamedRule(lambda t, **o: cpgd(t.w, t.guidance_scale, negative=t.reference, **o), contrasts=True),
    "negative_only": NamedRule(lambda t, **o: cpgd(t.w, t.guidance_scale, positive=t.reference, **o), contrasts=True),
    "npo": NamedRule(lambda t, **o: npo(t.guidance_scale, **o), contrasts=False),
    "chats": NamedRule(lambda t, **o: chats(t.guidance_scale, proxy=t.proxy, **o), contrasts=False),
    "autoguidance": NamedRule(lambda t, **o: autoguidance(t.w, **o), contrasts=True),
    "multi": NamedRule(lambda t, **o: multi(t.w, t.guidance_scale, reference=t.reference, **o), contrasts=True),
}
STEADY = tuple(name for name, rule in RULES.items() if not rule.contrasts)  # rules without a strength w
CONTRASTING = tuple(name for name, rule in RULES.items() if rule.contrasts)
OWN = re.compile(r"python:([\w.]+):(\w+)")


def find_rule(name: str) -> NamedRule:
    """The entry of a name, or of a function of the user, `python:MODULE:FUNCTION`.

    The function is called as `FUNCTION(w, guidance_scale, **options)`, or without w if it has no parameter of that
    name, and returns a `Rule`; options are every, between, rescale and shaping. The module is imported, that is,
    executed.

    Raises:
        ValueError: there is no such rule, module or function.
    """
    if name in RULES:
        return RULES[name]
    if not (match := OWN.fullmatch(name)):
        raise ValueError(f"no rule {name!r}; expected {', '.join(RULES)}, or python:MODULE:FUNCTION")
    try:
        function = getattr(importlib.import_module(match[1]), match[2])
    except ImportError as error:
        raise ValueError(
            f"rule {name}: cannot import {match[1]} ({error}); run from its folder, or set PYTHONPATH"
        ) from error
    except SyntaxError as error:
        raise ValueError(f"rule {name}: {error}") from error
    except AttributeError as error:
        raise ValueError(f"rule {name}: module {match[1]} has no {match[2]}") from error
    contrasts = "w" in inspect.signature(function).parameters

    def make(terms: Terms, **options) -> Rule:
        strengths = {"w": terms.w} if contrasts else {}
        try:
            rule = function(**strengths, guidance_scale=terms.guidance_scale, **options)
        except TypeError as error:
            raise ValueError(
                f"rule {name}: {error}; expected FUNCTION(w, guidance_scale, **options), with options passed on to Rule"
            ) from error
        if not isinstance(rule, Rule):
            raise ValueError(f"rule {name}: returned a {type(rule).__name__}; expected a flax_pref Rule")
        unset = isinstance(rule.w, float) and rule.w == 0
        if unset and not contrasts and any(part.coefficients for part in rule.terms(1.0)[1].values()):
            raise ValueError(f"rule {name}: has a contrast, but its function takes no w and sets none; expected one")
        return rule

    return NamedRule(make, contrasts)


def named_rule(
    name: str,
    *,
    guidance_scale: Strength | str,
    w: Strengths | str | None = None,
    module: str = "module",
    reference: str = "base",
    every: int = 1,
    between: Literal["hold", "extrapolate"] = "hold",
    rescale: float | None = None,
    proxy: float = 0.5,
    shaping: str | None = None,
) -> Rule:
    """A rule by its name.

    Args:
        name: one of `RULES`, or `python:MODULE:FUNCTION`, see `find_rule`.
        guidance_scale: of classifier-free guidance; text is read by `Schedule.parse`.
        w: strength of the modules, or one for each contrast by name; text is read by `parse_strengths`. Rules without
            a contrast do not use it.
        module: the network that pgd and fine_tuned go by.
        reference: the network that one-sided rules compare with.
        every: see `Rule`, as for between, rescale, proxy and shaping.

    Raises:
        ValueError: there is no such rule, a strength is not understood or not finite, or the rule has no guidance scale
            to rescale.
    """
    if name == "autoguidance" and rescale is not None:
        raise ValueError("rescale undoes what a guidance scale adds, and autoguidance has none; leave it out")
    s = Schedule.parse(guidance_scale) if isinstance(guidance_scale, str) else guidance_scale
    rule = find_rule(name)
    options: Mapping[str, Any] = {"rescale": rescale}
    if rule.contrasts:
        options = {**options, "every": every, "between": between}
    if shaping is not None:
        options = {**options, "shaping": shaping}
    return rule.make(Terms(parse_strengths(w) if isinstance(w, str) else w, s, module, reference, proxy), **options)
