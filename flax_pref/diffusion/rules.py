"""Guidance rules by name, with strengths as users write them."""

from typing import Any, Literal

from flax_pref.diffusion.guidance import (
    Rule,
    Schedule,
    Strength,
    autoguidance,
    cfg,
    chats,
    cpgd,
    cpgd_conditional,
    npo,
    pgd,
)

RuleName = Literal[
    "cfg",
    "fine_tuned",
    "pgd",
    "cpgd",
    "cpgd_conditional",
    "positive_only",
    "negative_only",
    "npo",
    "chats",
    "autoguidance",
]
STEADY = ("cfg", "fine_tuned", "npo", "chats")  # rules without a strength w
CONTRASTING = ("pgd", "cpgd", "cpgd_conditional", "positive_only", "negative_only", "autoguidance")


def named_rule(
    name: RuleName,
    *,
    guidance_scale: Strength | str,
    w: Strength | str | None = None,
    module: str = "module",
    reference: str = "base",
    every: int = 1,
    between: Literal["hold", "extrapolate"] = "hold",
    rescale: float | None = None,
    proxy: float = 0.5,
) -> Rule:
    """A rule of `diffusion.guidance`.

    Args:
        name: of the rule.
        guidance_scale: of classifier-free guidance; text is read by `Schedule.parse`.
        w: strength of the modules, likewise; not used by rules in STEADY.
        module: the network that pgd and fine_tuned go by.
        reference: the network that one-sided rules compare with.
        every: see `Rule`, as for between, rescale and proxy.

    Raises:
        ValueError: a strength is not understood or not finite, or the rule has no guidance scale to rescale.
    """
    if name == "autoguidance" and rescale is not None:
        raise ValueError("rescale undoes what a guidance scale adds, and autoguidance has none; leave it out")
    s, w = _strength(guidance_scale), _strength(w)
    options: dict[str, Any] = {"rescale": rescale}
    strong = {**options, "every": every, "between": between}
    return {
        "cfg": lambda: cfg(s, **options),
        "fine_tuned": lambda: cfg(s, module, **options),
        "npo": lambda: npo(s, **options),
        "chats": lambda: chats(s, proxy=proxy, **options),
        "pgd": lambda: pgd(w, s, module, reference=reference, **strong),
        "cpgd": lambda: cpgd(w, s, **strong),
        "cpgd_conditional": lambda: cpgd_conditional(w, s, **strong),
        "positive_only": lambda: cpgd(w, s, negative=reference, **strong),
        "negative_only": lambda: cpgd(w, s, positive=reference, **strong),
        "autoguidance": lambda: autoguidance(w, **strong),
    }[name]()


def _strength(given: Strength | str | None) -> Strength | None:
    return Schedule.parse(given) if isinstance(given, str) else given
