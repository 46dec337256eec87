"""Rules of guidance by preference modules (arXiv:2602.18799), and strengths along the trajectory.

Every rule adds contrasts of predictions to a steady part, each with a strength of its own,

    eps_hat(x, t) = steady(s) + sum_j w_j contrast_j(s)

where s is the scale of classifier-free guidance (arXiv:2207.12598; s = 1 is none) and

    CFG_s(N) = (1 - s) eps_N(x, empty) + s eps_N(x, text)

Everything below this text is also in flax_pref's pipeline.py for diffusers, word for word. Licence: Apache-2.0.
"""

import math

import torch

# ----------------------------------------------------------------------------------------------------------------------
# Rules


class Sum(dict):
    """A linear combination of predictions: the coefficient of each (network, prompt)."""

    def __add__(self, other):
        return Sum({row: self.get(row, 0.0) + other.get(row, 0.0) for row in {**self, **other}})

    def __sub__(self, other):
        return self + -1.0 * other

    def __rmul__(self, factor):
        return Sum({row: factor * coefficient for row, coefficient in self.items()})


def eps(network, prompt):
    """One prediction: of "base" or a module, for the prompt "text" or "empty"."""
    return Sum({(network, prompt): 1.0})


def cfg(network, s):
    """`CFG_s(network)`."""
    return (1 - s) * eps(network, "empty") + s * eps(network, "text")


def pgd(s, module, reference):
    """Preference-guided denoising: `CFG_s(base) + w (CFG_s(module) - CFG_s(reference))`, reference being the base."""
    return cfg("base", s), {"w": cfg(module, s) - cfg(reference, s)}


def cpgd(s, names, positive, negative):
    """Contrastive preference guidance: `CFG_s(base) + w (CFG_s(pos) - CFG_s(neg))`.

    With strengths a and b by name: `CFG_s(base) + a (CFG_s(pos) - CFG_s(base)) + b (CFG_s(base) - CFG_s(neg))`.
    """
    base, pos, neg = cfg("base", s), cfg(positive, s), cfg(negative, s)
    return base, {"w": pos - neg} if names == ["w"] else {positive: pos - base, negative: base - neg}


def cpgd_conditional(s):
    """cPGD on the prompt only: `CFG_s(base) + w (eps_pos(x, text) - eps_neg(x, text))`."""
    return cfg("base", s), {"w": eps("pos", "text") - eps("neg", "text")}


def multi(s, names, reference):
    """Several modules: `CFG_s(base) + sum_i w_i (CFG_s(i) - CFG_s(reference))` (arXiv:2505.18547)."""
    return cfg("base", s), {name: cfg(name, s) - cfg(reference, s) for name in names}


def npo(s):
    """NPO: `(1 - s) eps_neg(x, empty) + s eps_pos(x, text)` (arXiv:2505.11245)."""
    return (1 - s) * eps("neg", "empty") + s * eps("pos", "text"), {}


def autoguidance():
    """Autoguidance: `eps_bad(x, text) + w (eps_base(x, text) - eps_bad(x, text))` (arXiv:2406.02507)."""
    return eps("bad", "text"), {"w": eps("base", "text") - eps("bad", "text")}


# From s, the names of the strengths, the module of one-module rules and the network that modules are compared with.
RULES = {
    "cfg": lambda s, names, module, reference: (cfg("base", s), {}),
    "fine_tuned": lambda s, names, module, reference: (cfg(module, s), {}),
    "pgd": lambda s, names, module, reference: pgd(s, module, reference),
    "cpgd": lambda s, names, module, reference: cpgd(s, names, "pos", "neg"),
    "cpgd_conditional": lambda s, names, module, reference: cpgd_conditional(s),
    "positive_only": lambda s, names, module, reference: cpgd(s, names, "pos", reference),
    "negative_only": lambda s, names, module, reference: cpgd(s, names, reference, "neg"),
    "npo": lambda s, names, module, reference: npo(s),
    "autoguidance": lambda s, names, module, reference: autoguidance(),
    "multi": lambda s, names, module, reference: multi(s, names, reference),
}


# ----------------------------------------------------------------------------------------------------------------------
# Strengths along the trajectory


class Strength:
    """A strength in each step: a number, or `linear:8:0`, `cosine:0:8` or `list:8:4:0`.

    `@0.2:0.8` behind it restricts it to that part of the trajectory (arXiv:2404.07724): outside, w is 0 and s is 1.
    `norm:` before it makes it a share of the length of what classifier-free guidance adds in the same step.
    """

    def __init__(self, text):
        text = str(text)
        self.norm = text.startswith("norm:")
        course, at, interval = text.removeprefix("norm:").partition("@")
        self.shape, *values = course.split(":") if ":" in course else ("constant", course)
        try:
            self.values = [float(value) for value in values]
            self.start, self.stop = map(float, interval.split(":")) if at else (0.0, 1.0)
            expected = {"constant": 1, "linear": 2, "cosine": 2, "list": len(values)}[self.shape]
            if len(values) != expected or not all(map(math.isfinite, self.values)):
                raise ValueError
            if not 0 <= self.start < self.stop <= 1:
                raise ValueError
        except (ValueError, KeyError):
            raise ValueError(
                f"{text!r} is no strength; expected a number, linear:FIRST:LAST, cosine:FIRST:LAST or list:A:B:..., "
                "with norm: before it or @START:STOP behind it"
            ) from None

    def active(self, steps):
        """Whether each step lies in the interval; step i of S is at i / S, up to rounding."""
        return [self.start - 1e-9 <= i / steps < self.stop - 1e-9 for i in range(steps)]

    def at(self, steps, off):
        """The strength in each step; `off` outside of the interval."""
        active = self.active(steps)
        if self.shape == "list" and len(self.values) != steps:
            raise ValueError(f"a list of {len(self.values)} strengths, but the scheduler takes {steps} steps")
        course, last = [], max(1, sum(active) - 1)
        for i in range(steps):
            way = (sum(active[: i + 1]) - 1) / last
            if self.shape == "cosine":
                way = (1 - math.cos(math.pi * way)) / 2
            value = (
                self.values[i] if self.shape == "list" else self.values[0] + way * (self.values[-1] - self.values[0])
            )
            course.append(value if active[i] else off)
        return course


def parse_strengths(w):
    """Strengths by the names of their contrasts: of a number, of text such as `4` or `pos=3,neg=1`, or of a dict."""
    if isinstance(w, str) and "=" in w:
        w = dict(part.split("=", 1) for part in w.split(","))
    return {name.strip(): Strength(value) for name, value in (w if isinstance(w, dict) else {"w": w}).items()}


# ----------------------------------------------------------------------------------------------------------------------
# Guidance


class Guidance:
    """A rule for the steps of a trajectory.

    Args:
        rule: name, guidance_scale, w, module, reference, every, between and rescale. Contrasts are predicted in the
            first of `every` steps, and in the others held, or extrapolated on the line through the last two. rescale is
            the share phi of guidance rescale (arXiv:2305.08891, section 3.4).
        steps: S, as many as the scheduler takes.
    """

    def __init__(self, rule, steps):
        if rule["name"] not in RULES:
            raise ValueError(f"no rule {rule['name']!r}; expected {', '.join(RULES)}")
        self.rule, self.every, self.rescale = rule, rule.get("every", 1), rule.get("rescale")
        if type(self.every) is not int or self.every < 1:
            raise ValueError(f"every={self.every!r} must be a whole number from 1 up")
        scale = Strength(rule["guidance_scale"])
        if scale.norm:
            raise ValueError("guidance_scale cannot be norm-matched: a norm is a share of what it adds")
        strengths = {} if rule.get("w") is None else parse_strengths(rule["w"])
        self.names = list(strengths)
        contrasts = self.formula(2.0)[1]
        if contrasts and set(contrasts) != set(strengths):
            raise ValueError(f"w={rule.get('w')!r}: expected strengths for {', '.join(contrasts)}")
        strengths = {name: strengths[name] for name in contrasts}
        self.s = scale.at(steps, off=1.0)
        self.w = {name: strength.at(steps, off=0.0) for name, strength in strengths.items()}
        self.norms = {name for name, strength in strengths.items() if strength.norm}
        if self.norms and self.formula(0.0)[0] == self.formula(1.0)[0]:
            raise ValueError("norm: is measured by what guidance adds, and the rule has no classifier-free guidance")
        active = {name: strength.active(steps) for name, strength in strengths.items()}
        # Which steps have contrasts, and the number of each among them; in the first of `every` they are predicted.
        self.contrasted = [any(active[name][i] for name in active) for i in range(steps)]
        self.order = [sum(self.contrasted[: i + 1]) - 1 for i in range(steps)]
        # The contrasts that count in each group of `every` steps.
        self.counting = {}
        for i in range(steps):
            own = {name for name in active if active[name][i]}
            self.counting[self.order[i] // self.every] = self.counting.get(self.order[i] // self.every, set()) | own
        self.newest, self.before = None, None

    def formula(self, s):
        """Steady, and the contrasts by name."""
        rule = self.rule
        return RULES[rule["name"]](s, self.names, rule.get("module"), rule.get("reference", "base"))

    def __call__(self, i, predict):
        """The guided prediction of step i; predict makes a dict of predictions of a list of rows, see `combine`."""
        return self.combine(i, predict(self.rows(i)))

    def sums(self, i):
        """The sums of step i: steady for each scale, contrasts for each, and steady without guidance."""
        # At s = 1 a guided prediction is the text prediction that it is made of, by which rescaling goes.
        scales = [self.s[i]] + ([] if self.rescale is None else [1.0])
        group, place = divmod(self.order[i], self.every)
        predicted = self.counting[group] if self.contrasted[i] and place == 0 else set()
        terms = [self.formula(s) for s in scales]
        contrasts = [{name: part for name, part in parts.items() if name in predicted} for _, parts in terms]
        unguided = self.formula(0.0)[0] if self.contrasted[i] and self.norms else Sum()
        return [steady for steady, _ in terms], contrasts, unguided

    def rows(self, i):
        """The (network, prompt) of each prediction that step i needs."""
        steady, contrasts, unguided = self.sums(i)
        parts = [*steady, *(part for parts in contrasts for part in parts.values()), unguided]
        return list(dict.fromkeys(row for part in parts for row, coefficient in part.items() if coefficient))

    def combine(self, i, predictions):
        """The guided prediction of step i, float32 `[N, C, H, W]`; steps are asked for in their order.

        Args:
            i: number of the step.
            predictions: of each (network, prompt) of `rows(i)`, float32 `[N, C, H, W]` each.
        """
        steady, contrasts, unguided = self.sums(i)

        def total(part):
            return sum(coefficient * predictions[row] for row, coefficient in part.items() if coefficient)

        guided = [total(part) for part in steady]
        if any(contrasts):
            newest = [{name: total(part) for name, part in parts.items()} for parts in contrasts]
            self.newest, self.before = newest, self.newest
        if self.contrasted[i]:
            empty = total(unguided) if self.norms else None
            guided = [prediction + self.added(i, k, prediction, empty) for k, prediction in enumerate(guided)]
        if self.rescale is None:
            return guided[0]
        deviation, wanted = (x.std(dim=(1, 2, 3), keepdim=True) for x in guided)
        return guided[0] * (self.rescale * (wanted / deviation) + 1 - self.rescale)

    def added(self, i, k, guided, empty):
        """`sum_j w_j contrast_j` of the k-th scale."""
        extrapolates = self.rule.get("between") == "extrapolate" and self.before is not None
        ahead = self.order[i] % self.every / self.every if extrapolates else 0.0
        added = torch.zeros_like(guided)
        for name, contrast in self.newest[k].items():
            if ahead and name in self.before[k]:
                contrast = contrast + ahead * (contrast - self.before[k][name])
            if name in self.norms:  # as long as what classifier-free guidance adds
                length = _length(contrast)
                contrast = torch.where(length == 0, 0.0, _length(guided - empty) / length) * contrast
            added = added + self.w[name][i] * contrast
        return added


def _length(x):
    """Euclidean length of each image, `[N, C, H, W] -> [N, 1, 1, 1]`."""
    return x.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
