"""Guidance is a table: every rule is a linear combination of predictions, one row for each.

    eps_hat(x, t) = sum over rows of coefficient(t) * eps_network(x, t, prompt)

A rule is a function of a few lines that says which. Below, `CFG_s(N) = (1 - s) eps_N(x, empty) + s eps_N(x, text)`, and
all rules have the form `steady(s) + w contrast(s)`: the contrast is what a guidance interval switches off, and what
changes slowly enough to be predicted in some steps only. A rule may have several contrasts, each with its own strength.

Strengths, w and s, are numbers, one number for each image, or a `Schedule` along the trajectory. What is added to the
steady part may be shaped, see `diffusion.shaping`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, cast, get_args

import jax
import numpy as np

from flax_pref.diffusion.shaping import parse_shaping
from flax_pref.shapes import Array

Prompt = Literal["text", "empty", "proxy"]
Shape = Literal["constant", "linear", "cosine", "list"]

# ----------------------------------------------------------------------------------------------------------------------
# Strengths along the trajectory


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A strength along the trajectory: step i of S lies at the fraction i / S of it.

    From `start` to `stop`, fractions, the strength takes the course that `shape` says; outside it is off, which is
    w = 0 and s = 1 (arXiv:2404.07724), and predictions that only it needs are not made there. Changing start or stop
    recompiles a sampler; changing values does not.

    Attributes:
        values: of "constant" one, of "linear" and "cosine" the first and the last, of "list" one for each step of the
            solver, those outside of the interval included; each is a number or an array `[N]`, one per image.
        shape: "linear" goes from the first value to the last by equal steps, "cosine" by half a wave, slow at its ends.
        start: where the strength begins, from 0 up.
        stop: before which it ends, up to 1.
        norm: whether the strength is a share of what classifier-free guidance adds: `|w contrast| = value |CFG_s -
            eps(x, empty)|` in each step of each image. One value fits modules that were trained for any length.

    Example:
        >>> fp.Schedule((8.0, 2.0), "linear", stop=0.75).at(4, off=0.0)[:, 0].tolist()
        [8.0, 5.0, 2.0, 0.0]
        >>> rule = fp.cpgd(fp.Schedule.parse("linear:8:2@0:0.75"), 7.5)
    """

    values: tuple
    shape: Shape = "constant"
    start: float = 0.0
    stop: float = 1.0
    norm: bool = False

    def __post_init__(self):
        expected = {"constant": 1, "linear": 2, "cosine": 2}
        if self.shape not in (*expected, "list"):
            raise ValueError(f"Schedule: shape={self.shape!r}, expected {', '.join(map(repr, expected))} or 'list'")
        if len(self.values) != expected.get(self.shape, len(self.values)) or not len(self.values):
            raise ValueError(f"Schedule: {len(self.values)} values, expected {expected.get(self.shape, 'some')}")
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"Schedule: expected 0 <= start < stop <= 1, got start={self.start}, stop={self.stop}")

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Reads `4`, `linear:8:0`, `cosine:0:8` or `list:1:2:3`, each perhaps with an interval: `4@0.2:0.8`.

        A `norm:` in front makes it a share of what classifier-free guidance adds: `norm:0.3`, `norm:linear:0.5:0`.

        Raises:
            ValueError: it is none of these.
        """
        norm = text.startswith("norm:")
        course, at, interval = text.removeprefix("norm:").partition("@")
        shape, *values = course.split(":") if ":" in course else ("constant", course)
        try:
            ends = dict(zip(("start", "stop"), map(float, interval.split(":")), strict=True)) if at else {}
            return cls(tuple(map(float, values)), cast(Shape, shape), norm=norm, **ends)
        except ValueError as error:
            raise ValueError(
                f"{text!r} is no strength ({error}); expected a number, linear:FIRST:LAST, cosine:FIRST:LAST or "
                "list:A:B:..., with norm: before it for a share of what guidance adds, with @START:STOP behind it for "
                "a part of the trajectory"
            ) from error

    def active(self, num_steps: int) -> np.ndarray:
        """The steps in the interval, bool `[S]`."""
        fractions = np.arange(num_steps) / num_steps
        # Fractions such as 0.3 are rounded: a step that lies on an end must not depend on it.
        return (fractions >= self.start - 1e-9) & (fractions < self.stop - 1e-9)

    def at(self, num_steps: int, off: float) -> np.ndarray:
        """The strength in each step, float64 `[S, 1]` or `[S, N]`; `off` outside of the interval.

        Raises:
            ValueError: a list has not one value for each step.
        """
        active = self.active(num_steps)
        values = [np.atleast_1d(np.asarray(value, np.float64)) for value in self.values]
        if self.shape == "list":
            if len(values) != num_steps:
                raise ValueError(
                    f"Schedule: a list of {len(values)} values for {num_steps} steps of the solver; expected one for "
                    "each (pndm takes one step more than it is asked for)"
                )
            course = np.stack(np.broadcast_arrays(*values))
        else:
            way = (np.cumsum(active) - 1)[:, None] / max(1, active.sum() - 1)
            way = (1 - np.cos(np.pi * way)) / 2 if self.shape == "cosine" else way
            course = values[0] + way * (values[-1] - values[0])
        return np.where(active[:, None], course, off)


Strength = float | Sequence[float] | np.ndarray | Schedule
Strengths = Strength | Mapping[str, Strength]


def parse_strengths(text: str) -> Schedule | dict[str, Schedule]:
    """Reads one strength, see `Schedule.parse`, or several by name: `pos=3,neg=linear:0:1`.

    Raises:
        ValueError: it is neither.
    """
    if "=" not in text:
        try:
            return Schedule.parse(text)
        except ValueError as error:
            raise ValueError(f"{error}, or one for each module by name: pos=3,neg=1") from error
    parsed: dict[str, Schedule] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name.strip() or name.strip() in parsed:
            raise ValueError(f"{text!r}: expected a strength for each name, once, such as pos=3,neg=1")
        parsed[name.strip()] = Schedule.parse(value)
    return parsed


# ----------------------------------------------------------------------------------------------------------------------
# Rules


class Combination:
    """A linear combination of predictions; coefficients are numbers or arrays."""

    __array_ufunc__ = None  # array * combination is ours to answer, not numpy's

    def __init__(self, coefficients: dict[tuple[str, Prompt], np.ndarray | float]):
        self.coefficients = coefficients

    def __add__(self, other: "Combination") -> "Combination":
        rows = {**self.coefficients, **other.coefficients}
        return Combination({row: self.of(row) + other.of(row) for row in rows})

    def __sub__(self, other: "Combination") -> "Combination":
        return self + -1 * other

    def __rmul__(self, factor: np.ndarray | float) -> "Combination":
        return Combination({row: factor * coefficient for row, coefficient in self.coefficients.items()})

    def of(self, row: tuple[str, Prompt]) -> np.ndarray | float:
        """The coefficient of a row."""
        return self.coefficients.get(row, 0.0)


NOTHING = Combination({})


def eps(network: str, prompt: Prompt) -> Combination:
    """One prediction.

    Args:
        network: "base", or the name of a module.
        prompt: "text", "empty" (the empty or negative prompt) or "proxy" (that of CHATS, see `Rule`).

    Raises:
        ValueError: there is no such prompt.
    """
    if prompt not in get_args(Prompt):
        raise ValueError(f"eps({network!r}, {prompt!r}): no such prompt; expected {', '.join(get_args(Prompt))}")
    return Combination({(network, prompt): 1.0})


def cfg_of(network: str, s: np.ndarray | float) -> Combination:
    """`CFG_s(network)`."""
    return (1 - s) * eps(network, "empty") + s * eps(network, "text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """`eps_hat = steady(s) + w contrast(s)`, with its strengths and with what may be done to make it cheaper.

    Attributes:
        formula: gives steady and contrast for a guidance scale; or steady and a dict of contrasts by name.
        guidance_scale: s of classifier-free guidance; 1 is none.
        w: strength of the contrast; or a dict of strengths, one for each contrast by its name.
        every: the contrast is predicted in the first of every so many steps of w's interval, and reused in the others.
        between: how it is reused: "hold" as it is, or "extrapolate" on the line through the last two.
        rescale: None, or the share phi of classifier-free guidance rescale (arXiv:2305.08891, section 3.4), a number or
            `[N]`: the guided prediction is scaled towards the standard deviation of the text prediction that it is made
            of, which is the rule itself at s = 1, its contrast included.
        proxy: a, of the prompt "proxy" (arXiv:2502.12579): `(1 + a) blank - a text` in embeddings, where blank is the
            encoded empty text "", whatever the rows "empty" see.
        shaping: what is done to `w contrast` before it is added, such as "cap:0.5"; see `shaping.SHAPINGS`. None:
            nothing.

    Example:
        PGD, as a rule of one's own:

        >>> from flax_pref.diffusion.guidance import cfg_of
        >>> def formula(s):
        ...     return cfg_of("base", s), cfg_of("dpo", s) - cfg_of("base", s)
        >>> fp.Rule(formula=formula, guidance_scale=7.5, w=2.0).networks()
        ('base', 'dpo')
    """

    formula: Callable[[np.ndarray | float], tuple[Combination, Combination | Mapping[str, Combination]]]
    guidance_scale: Strength = 1.0
    w: Strengths = 0.0
    every: int = 1
    between: Literal["hold", "extrapolate"] = "hold"
    rescale: float | np.ndarray | None = None
    proxy: float = 0.5
    shaping: str | None = None

    def __post_init__(self):
        if not (isinstance(self.every, int) and self.every >= 1):
            raise ValueError(f"every={self.every!r} must be a whole number from 1 up")
        if self.between not in ("hold", "extrapolate"):
            raise ValueError(f"between={self.between!r}, expected 'hold' or 'extrapolate'")
        strengths = {"guidance_scale": self.guidance_scale, **self.strengths, "proxy": self.proxy}
        if (names := self.terms(1.0)[1].keys()) != self.strengths.keys():
            given = f"strengths for {', '.join(self.w)}" if isinstance(self.w, Mapping) else "one strength"
            expected = "a single one, such as 3"
            if names != {"w"}:
                expected = f"one for each of {', '.join(names)}, such as {','.join(f'{name}=3' for name in names)}"
            raise ValueError(f"w has {given}; this rule expects {expected}")
        for name, value in (strengths | ({} if self.rescale is None else {"rescale": self.rescale})).items():
            values = value.values if isinstance(value, Schedule) else (value,)
            for number in np.concatenate([np.ravel(value) for value in values]):
                if not math.isfinite(number):
                    raise ValueError(f"{name} must be finite, got {number}")
                if name == "rescale" and not 0 <= number <= 1:
                    raise ValueError(f"rescale must lie in 0 .. 1, got {number}")
        if _is_norm(self.guidance_scale):
            raise ValueError("guidance_scale cannot be norm-matched: a norm is a share of what it adds")
        if self.shaping is not None:
            parse_shaping(self.shaping)
        if self.measures:
            name = "norm" if self.shaping is None else f"shaping {self.shaping!r}"
            if not any(contrast.coefficients for contrast in self.terms(1.0)[1].values()):
                raise ValueError(f"{name}: the rule has no contrast to shape")
            empty, text = (self.terms(s)[0].coefficients for s in (0.0, 1.0))
            if empty == text:
                raise ValueError(
                    f"{name}: is measured by what guidance adds, and the rule has no classifier-free guidance"
                )

    @property
    def measures(self) -> bool:
        """Whether what is added depends on the lengths of predictions, that is, is not linear in them."""
        return self.shaping is not None or any(map(_is_norm, self.strengths.values()))

    @property
    def strengths(self) -> Mapping[str, Strength]:
        """The strength of each contrast; a single one is named "w"."""
        return self.w if isinstance(self.w, Mapping) else {"w": self.w}

    def terms(self, guidance_scale: np.ndarray | float) -> tuple[Combination, Mapping[str, Combination]]:
        """Steady, and the contrast of each of `strengths`.

        Raises:
            ValueError: the formula is no pair of linear combinations.
        """
        try:
            steady, contrast = self.formula(guidance_scale)
            contrasts = contrast if isinstance(contrast, Mapping) else {"w": contrast}
            if not all(isinstance(part, Combination) for part in (steady, *contrasts.values())):
                raise TypeError("it returned something else")
        except (TypeError, AttributeError) as error:  # a product of predictions, say, or one part alone
            raise ValueError(
                f"a rule's formula: {error}; expected steady and contrast, sums of eps(network, prompt) times numbers"
            ) from error
        return steady, contrasts

    def networks(self) -> tuple[str, ...]:
        """The networks that the rule asks for predictions of."""
        steady, contrasts = self.terms(2.0)
        rows = [row for part in (steady, *contrasts.values()) for row in part.coefficients]
        return tuple(dict.fromkeys(network for network, _ in rows))


def cfg(guidance_scale: Strength = 7.5, network: str = "base", **options) -> Rule:
    """Classifier-free guidance, `CFG_s(network)` (arXiv:2207.12598; here s = 1 is no guidance).

    Args:
        guidance_scale: s; a number, one number per image, or a `Schedule`.
        network: "base", or the name of a fine-tuned network.
        options: `rescale` of `Rule`.

    Raises:
        ValueError: a strength is not finite, or an option is out of its range.

    Example:
        >>> fp.cfg(7.5).networks()
        ('base',)
        >>> fp.cfg(7.5, "dpo").networks()  # a fine-tuned model
        ('dpo',)
    """
    return Rule(formula=lambda s: (cfg_of(network, s), NOTHING), guidance_scale=guidance_scale, **options)


def pgd(w: Strength, guidance_scale: Strength, fine_tuned: str = "dpo", *, reference: str = "base", **options) -> Rule:
    """Preference-guided denoising, `(1 - w) CFG_s(base) + w CFG_s(fine_tuned)` (arXiv:2602.18799).

    w = 0 is the base network, w = 1 the fine-tuned one, and w > 1 extrapolates. It is also the one-sided rule of
    a positive module.

    Args:
        w: strength of the module; a number, one number per image, or a `Schedule`.
        guidance_scale: s of classifier-free guidance, likewise.
        fine_tuned: name of the module.
        reference: network that the module is compared with. Where it is the base that the module was trained on, not
            the one it guides, the rule is `CFG_s(base) + w (CFG_s(fine_tuned) - CFG_s(reference))`.
        options: `every`, `between`, `rescale` and `shaping` of `Rule`.

    Raises:
        ValueError: a strength is not finite, or an option is out of its range.

    Example:
        >>> fp.pgd(2.0, 7.5).networks()
        ('base', 'dpo')
    """
    return Rule(
        formula=lambda s: (cfg_of("base", s), cfg_of(fine_tuned, s) - cfg_of(reference, s)),
        guidance_scale=guidance_scale,
        w=w,
        **options,
    )


def cpgd(w: Strengths, guidance_scale: Strength, positive: str = "pos", negative: str = "neg", **options) -> Rule:
    """Contrastive preference guidance, `CFG_s(base) + w (CFG_s(positive) - CFG_s(negative))` (arXiv:2602.18799).

    With a strength for each module, `w={"pos": a, "neg": b}`, it is
    `CFG_s(base) + a (CFG_s(pos) - CFG_s(base)) + b (CFG_s(base) - CFG_s(neg))`.

    Args:
        w: strength of the contrast; a number, one number per image, or a `Schedule`; or a dict of one for each module.
        guidance_scale: s of classifier-free guidance, likewise.
        positive: name of the positive module; "base" for the one-sided rule of the negative one.
        negative: name of the negative module; "base" for the one-sided rule of the positive one.
        options: `every`, `between`, `rescale` and `shaping` of `Rule`.

    Raises:
        ValueError: a strength is not finite, or an option is out of its range.

    Example:
        >>> fp.cpgd(2.0, 7.5).networks()
        ('base', 'pos', 'neg')
        >>> rule = fp.cpgd({"pos": 3.0, "neg": 1.0}, 7.5)  # a strength for each module
    """

    def formula(s):
        base, pos, neg = (cfg_of(network, s) for network in ("base", positive, negative))
        return base, {positive: pos - base, negative: base - neg} if isinstance(w, Mapping) else pos - neg

    return Rule(formula=formula, guidance_scale=guidance_scale, w=w, **options)


def multi(w: Mapping[str, Strength], guidance_scale: Strength, *, reference: str = "base", **options) -> Rule:
    """Several modules with a strength each, `CFG_s(base) + sum_i w_i (CFG_s(i) - CFG_s(base))` (DB-MPA,
    arXiv:2505.18547).

    Args:
        w: strength of each module by its name; a number, one number per image, or a `Schedule`.
        guidance_scale: s of classifier-free guidance, likewise.
        reference: network that the modules are compared with, see `pgd`.
        options: `every`, `between`, `rescale` and `shaping` of `Rule`.

    Raises:
        ValueError: there is no module, a strength is not finite, or an option is out of its range.

    Example:
        >>> fp.multi({"faithful": 1.0, "aesthetic": 0.5}, 7.5).networks()
        ('base', 'faithful', 'aesthetic')
    """
    if not isinstance(w, Mapping) or not w:
        raise ValueError(
            "multi: no modules; expected a strength for each by its name, such as faithful=1,aesthetic=0.5"
        )
    return Rule(
        formula=lambda s: (cfg_of("base", s), {name: cfg_of(name, s) - cfg_of(reference, s) for name in w}),
        guidance_scale=guidance_scale,
        w=w,
        **options,
    )


def cpgd_conditional(
    w: Strength, guidance_scale: Strength, positive: str = "pos", negative: str = "neg", **options
) -> Rule:
    """cPGD on the prompt only: `CFG_s(base) + w (eps_positive(x, text) - eps_negative(x, text))`, 4 predictions not 6.

    In cPGD the contrast is multiplied by s as well: compare this at w with that at about w / s. Arguments, options and
    errors are those of `cpgd`, with a single w.

    Example:
        >>> fp.cpgd_conditional(15.0, 7.5).networks()
        ('base', 'pos', 'neg')
    """
    return Rule(
        formula=lambda s: (cfg_of("base", s), eps(positive, "text") - eps(negative, "text")),
        guidance_scale=guidance_scale,
        w=w,
        **options,
    )


def npo(guidance_scale: Strength, positive: str = "pos", negative: str = "neg", **options) -> Rule:
    """NPO, `(1 - s) eps_negative(x, empty) + s eps_positive(x, text)` (arXiv:2505.11245).

    Args:
        guidance_scale: s; a number, one number per image, or a `Schedule`.
        positive: name of the network that sees the prompt; "base" where only a negative module was trained.
        negative: name of the network that sees the empty prompt.
        options: `rescale` of `Rule`.

    Raises:
        ValueError: a strength is not finite, or an option is out of its range.

    Example:
        >>> fp.npo(7.5).networks()
        ('neg', 'pos')
    """
    return Rule(
        formula=lambda s: ((1 - s) * eps(negative, "empty") + s * eps(positive, "text"), NOTHING),
        guidance_scale=guidance_scale,
        **options,
    )


def chats(
    guidance_scale: Strength, positive: str = "pos", negative: str = "neg", *, proxy: float = 0.5, **options
) -> Rule:
    """CHATS, `s eps_positive(x, text) - (s - 1) eps_negative(x, proxy)` (arXiv:2502.12579).

    The proxy prompt is `(1 + a) blank - a text` in embeddings, with a = `proxy` and blank the encoded empty text "",
    also where "empty" is zeros (SDXL) or a negative prompt. The paper's scale is s - 1.

    Args:
        guidance_scale: s; a number, one number per image, or a `Schedule`.
        positive: name of the positive module.
        negative: name of the negative module.
        proxy: a, of the proxy prompt.
        options: `rescale` of `Rule`.

    Raises:
        ValueError: a strength is not finite, or an option is out of its range.

    Example:
        >>> fp.chats(7.5, proxy=0.5).networks()
        ('pos', 'neg')
    """
    return Rule(
        formula=lambda s: (s * eps(positive, "text") - (s - 1) * eps(negative, "proxy"), NOTHING),
        guidance_scale=guidance_scale,
        proxy=proxy,
        **options,
    )


def autoguidance(w: Strength, good: str = "base", bad: str = "bad", **options) -> Rule:
    """Autoguidance, `eps_bad(x, text) + w (eps_good(x, text) - eps_bad(x, text))` (arXiv:2406.02507).

    w = 1 is the good network alone, and w > 1 extrapolates.

    Args:
        w: a number, one number per image, or a `Schedule`.
        good: name of the network that is guided.
        bad: name of a worse network of the same kind, e.g. an earlier checkpoint.
        options: `every` and `between` of `Rule`.

    Raises:
        ValueError: a strength is not finite, or an option is out of its range.

    Example:
        >>> fp.autoguidance(2.0).networks()
        ('bad', 'base')
    """
    return Rule(formula=lambda s: (eps(bad, "text"), eps(good, "text") - eps(bad, "text")), w=w, **options)


def merge_weights(rule: Rule) -> dict[str, float]:
    """Weight-space equivalent of guidance with strength w: `theta_base + sum of weight * theta_network`
    (arXiv:2602.18799).

    For cPGD `{"pos": w, "neg": -w}`, for PGD `{"dpo": w, "base": -w}`; see `checkpoints.modules.merge_modules`.

    Raises:
        ValueError: w is not one number, or the rule has no contrast or shapes it.

    Example:
        >>> fp.merge_weights(fp.cpgd(2.0, 7.5))
        {'pos': 2.0, 'neg': -2.0}
    """
    if rule.shaping is not None:
        raise ValueError(f"shaping {rule.shaping!r}: weights hold a contrast as it is; merge a rule without shaping")
    shares: dict[str, float] = {}
    _, contrasts = rule.terms(0.0)  # at s = 0 the whole of CFG_s(N) is one prediction of N
    for name, w in rule.strengths.items():
        if not isinstance(w, float | int | np.ndarray | np.generic) or np.ndim(w):
            raise ValueError(f"{name}={w!r}: only one number for all steps and images can be merged into weights")
        for (network, _), coefficient in contrasts[name].coefficients.items():
            shares[network] = shares.get(network, 0.0) + float(w * coefficient)
    if not shares:
        raise ValueError("a rule without w has nothing to merge; expected PGD, cPGD or one of their kind")
    return shares


# ----------------------------------------------------------------------------------------------------------------------
# Tables


class GuidanceStep(NamedTuple):
    """What one step does.

    Attributes:
        rows: indices of the rows that it predicts.
        contrast: "none", "new" (all contrasts are predicted here) or "reused" (from the last step that did).
    """

    rows: tuple[int, ...]
    contrast: Literal["none", "new", "reused"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A rule of J contrasts for S steps of R rows and N images: what a sampler follows.

    Tables of one layout share what is compiled.

    Attributes:
        rows: network and prompt of each row.
        plans: one for each step.
        steady: coefficients, float32 `[S, R, N]`.
        contrast: coefficients, float32 `[S, J, R, N]`.
        text: steady and contrast of the text prediction that rescaling and shaping go by, likewise; None where neither
            is done.
        empty: steady of the prediction for the empty prompt that shaping goes by, likewise.
        w: float32 `[S, J, N]`.
        extrapolation: float32 `[S, J]`, 0 where the contrast is held.
        rescale: float32 `[N]`, or None.
        proxy: float32 scalar.
        shaping: name of what is done to the contrasts, see `shaping.SHAPINGS`.
        norms: of each contrast, whether w is a share of what classifier-free guidance adds.
        shaping_numbers: float32 `[P]`.
    """

    rows: tuple[tuple[str, Prompt], ...] = dataclasses.field(metadata={"static": True})
    plans: tuple[GuidanceStep, ...] = dataclasses.field(metadata={"static": True})
    steady: Array
    contrast: Array
    text: tuple[Array, Array] | None
    empty: Array | None
    w: Array
    extrapolation: Array
    rescale: Array | None
    proxy: Array
    shaping: str | None = dataclasses.field(metadata={"static": True})
    norms: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
    shaping_numbers: Array

    def images(self, chosen: np.ndarray) -> "Table":
        """The table of some of its images."""
        return dataclasses.replace(
            self,
            steady=self.steady[..., chosen],
            contrast=self.contrast[..., chosen],
            text=jax.tree.map(lambda part: part[..., chosen], self.text),
            empty=None if self.empty is None else self.empty[..., chosen],
            w=self.w[..., chosen],
            rescale=None if self.rescale is None else self.rescale[chosen],
        )

    @property
    def evaluations(self) -> int:
        """Predictions made for one image."""
        return sum(len(plan.rows) for plan in self.plans)


def tabulate(rule: Rule, num_steps: int, num_images: int, *, keep_unguided: bool = False) -> Table:
    """The table of a rule.

    Its layout depends on the rule and on intervals only, not on strengths: a row whose coefficient is zero because w is
    stays, or a sweep over w would recompile. A guidance scale that is 1 throughout is off, and predictions that only it
    needs are not made.

    Args:
        rule: to follow.
        num_steps: S, the rows of a solver.
        num_images: N; strengths that are given per image must be as many.
        keep_unguided: whether a guidance scale of 1 is one like any other, for a program that has its layout.

    Raises:
        ValueError: a strength has another number of values, or a coefficient is not finite.
    """
    steps, images = range(num_steps), (num_steps, num_images)
    s, ws = _schedule(rule.guidance_scale), {name: _schedule(w) for name, w in rule.strengths.items()}
    scale = _broadcast(s.at(num_steps, 1.0), images, "guidance_scale")
    strength = np.stack([_broadcast(w.at(num_steps, 0.0), images, name) for name, w in ws.items()], axis=1)
    steady, contrasts = rule.terms(scale)
    rows = tuple(dict.fromkeys(row for part in (steady, *contrasts.values()) for row in part.coefficients))
    networks = [network for network, _ in rows]
    rows = tuple(sorted(rows, key=lambda row: networks.index(row[0])))  # rows of one network beside each other
    # What a step needs, by a scale like any other where guidance is on: values must not decide.
    guided = s.active(num_steps) & (keep_unguided or not all(np.all(np.asarray(value) == 1) for value in s.values))
    steady_typical, contrasts_typical = rule.terms(np.where(guided, np.pi, 1.0))
    steady_needs = np.array([_needs(steady_typical, row, num_steps) for row in rows])
    # For each contrast, the steps in which it counts, and in which it needs each row.
    needs = {name: np.array([_needs(part, row, num_steps) for row in rows]) for name, part in contrasts_typical.items()}
    counts = {name: ws[name].active(num_steps) & needs[name].any(axis=0) for name in ws}
    contrasted = np.any(list(counts.values()), axis=0)
    if rule.measures:  # by predictions that guidance alone may not need in this step
        for part in (rule.terms(0.0)[0], rule.terms(1.0)[0]):
            steady_needs |= contrasted & np.array([_needs(part, row, num_steps) for row in rows])
    order = np.cumsum(contrasted) - 1
    new = contrasted & (order % rule.every == 0)
    # A step predicts what counts in it or in a step that uses its contrasts again.
    users = [np.cumsum(new) == number for number in np.cumsum(new)]
    contrast_needs = np.any([needs[name] & [bool((counts[name] & own).any()) for own in users] for name in ws], axis=0)
    plans = tuple(
        GuidanceStep(
            tuple(r for r in range(len(rows)) if steady_needs[r, i] or (new[i] and contrast_needs[r, i])),
            "new" if new[i] else "reused" if contrasted[i] else "none",
        )
        for i in steps
    )
    # On the line through the last two predictions of a contrast, where it counts in both.
    groups, ahead = np.cumsum(new), np.where(rule.between == "extrapolate", order % rule.every, 0) / rule.every
    extrapolation = np.stack(
        [ahead * [bool((counts[name] & (groups == number - 1)).any()) for number in groups] for name in ws], axis=1
    )
    text = rule.terms(1.0)
    name, numbers = (None, ()) if rule.shaping is None else parse_shaping(rule.shaping)
    table = Table(
        rows=rows,
        plans=plans,
        steady=_coefficients(steady, rows, images),
        contrast=_stacked(contrasts, rows, images),
        # At s = 1 a guided prediction is the text prediction that it is made of.
        text=(_coefficients(text[0], rows, images), _stacked(text[1], rows, images))
        if rule.rescale is not None or rule.measures
        else None,
        empty=_coefficients(rule.terms(0.0)[0], rows, images) if rule.measures else None,
        w=strength.astype(np.float32),
        extrapolation=extrapolation.astype(np.float32),
        rescale=None
        if rule.rescale is None
        else _broadcast(np.asarray(rule.rescale, np.float32), (num_images,), "rescale").astype(np.float32),
        proxy=np.asarray(rule.proxy, np.float32),
        shaping=name,
        norms=tuple(map(_is_norm, rule.strengths.values())),
        shaping_numbers=np.asarray(numbers, np.float32),
    )
    for r, (network, prompt) in enumerate(rows):
        with np.errstate(over="ignore"):
            total = np.abs(table.steady[:, r]) + (np.abs(table.w) * np.abs(table.contrast[:, :, r])).sum(axis=1)
        if not np.isfinite(total).all():
            raise ValueError(f"coefficient of ({network}, {prompt}) must be finite, got {total.max()}")
    return table


def _is_norm(strength: Strength) -> bool:
    return isinstance(strength, Schedule) and strength.norm


def _schedule(strength: Strength) -> Schedule:
    return strength if isinstance(strength, Schedule) else Schedule((strength,))


def _broadcast(values: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    if values.ndim and values.shape[-1] not in (1, shape[-1]):
        raise ValueError(f"{name} has {values.shape[-1]} values for {shape[-1]} images; expected one, or one for each")
    return np.broadcast_to(values, shape)


def _needs(part: Combination, row: tuple[str, Prompt], num_steps: int) -> np.ndarray:
    """Whether the coefficient of a row is not zero, bool `[S]`."""
    return np.broadcast_to(part.of(row), num_steps) != 0


def _stacked(parts: Mapping[str, Combination], rows: Sequence, images: tuple[int, int]) -> np.ndarray:
    return np.stack([_coefficients(part, rows, images) for part in parts.values()], axis=1)


def _coefficients(part: Combination, rows: Sequence, images: tuple[int, int]) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.stack([np.broadcast_to(part.of(row), images) for row in rows], axis=1).astype(np.float32)
