"""The rules that a page offers: those that the loaded modules allow."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flax_pref.checkpoints.modules import OWN_BASE
from flax_pref.diffusion.drawing_flags import DrawingFlags
from flax_pref.diffusion.rules import OWN, RULES, find_rule, named_rule

# What a reader of the page has to know of a rule; docs/guidance.md has all of it. M is the module of the choice.
ABOUT: Mapping[str, str] = {
    "cfg": "Classifier-free guidance of the base: no module, and so one image.",
    "fine_tuned": "CFG(M): the module itself, without the base.",
    "pgd": "CFG(base) + w (CFG(M) - CFG(base)). w = 1 is the module itself.",
    "cpgd": "CFG(base) + w (CFG(pos) - CFG(neg)).",
    "cpgd_conditional": "CFG(base) + w (pos - neg), both for the prompt only: a third cheaper than cpgd.",
    "positive_only": "CFG(base) + w (CFG(pos) - CFG(base)).",
    "negative_only": "CFG(base) + w (CFG(base) - CFG(neg)).",
    "npo": "CFG with pos for the prompt and neg for the empty prompt.",
    "chats": "CHATS: pos for the prompt, neg for the proxy prompt.",
    "autoguidance": "bad + w (base - bad), for the prompt only. w = 1 is the base; the guidance scale is not used.",
    "multi": "CFG(base) + the sum of w (CFG(M) - CFG(base)), with a w for each module.",
}
PREFERRED = ("cpgd", "pgd", "autoguidance", "cfg")  # what a page begins with, where no flag says so


class Offer(NamedTuple):
    """A rule with the modules that it uses.

    Attributes:
        label: as the page names it.
        rule: its name.
        modules: that it uses.
        strengths: names of its strengths w: none, "w", or for `multi` those of its modules.
        about: what it computes, in a line.
    """

    label: str
    rule: str
    modules: tuple[str, ...]
    strengths: tuple[str, ...]
    about: str


def offered(modules: Sequence[str], flags: DrawingFlags) -> list[Offer]:
    """The rules whose modules are all there; a rule that takes any module is there once for each.

    Args:
        modules: names of the modules, in order.
        flags: their `--rule` is offered too, where it is the user's own function.
    """
    reference = "base" if flags.module_base is None else OWN_BASE
    offers: dict[tuple[str, frozenset[str]], Offer] = {}
    for name in (*RULES, *([flags.rule] if flags.rule not in RULES else [])):
        own = OWN.fullmatch(name)
        several = name == "multi"
        if several and len(modules) < 2:  # pgd, then
            continue
        strengths = tuple(modules) if several else ("w",) if find_rule(name).contrasts else ()
        for module in modules or ("module",):
            w = dict.fromkeys(modules, 1.0) if several else 1.0
            rule = named_rule(name, guidance_scale=7.5, w=w, module=module, reference=reference)
            used = frozenset(rule.networks()) - {"base", OWN_BASE}
            if not used <= set(modules):
                continue
            choice = len(used) == 1 and len(modules) > 1 and name in ("pgd", "fine_tuned")
            label = f"{name} ({module})" if choice else own[2] if own else name
            about = ABOUT.get(name, f"Your rule {name.removeprefix('python:')}.")
            if choice or len(modules) == 1:
                about = about.replace("(M)", f"({module})")
            offer = Offer(label, name, tuple(name for name in modules if name in used), strengths, about)
            offers.setdefault((name, used), offer)
    return list(offers.values())


def first_offer(offers: Sequence[Offer], flags: DrawingFlags) -> Offer:
    """The offer that a page begins with: the rule of the flags, or one that uses modules.

    Raises:
        ValueError: the modules do not allow the rule of the flags.
    """
    wanted = PREFERRED if flags.rule == "cfg" else (flags.rule,)
    for name in wanted:
        for offer in offers:
            if offer.rule == name:
                return offer
    raise ValueError(
        f"--rule {flags.rule}: needs modules that are not given; expected --module NAME=PATH for each, or one of "
        f"{', '.join(dict.fromkeys(offer.rule for offer in offers))}"
    )
