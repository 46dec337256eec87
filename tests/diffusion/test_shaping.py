"""What is done to a contrast, each beside a transcription in float64 in which nothing of ours takes part."""

import jax
import numpy as np
import pytest
from test_sampler import EMPTY, IDS, SCHEDULE, SOLVER, TEXT, S, W, draw, network, noises

from flax_pref.diffusion.exponential_solvers import dpmpp
from flax_pref.diffusion.guidance import Schedule, autoguidance, cfg, cpgd, cpgd_conditional, multi, pgd, tabulate
from flax_pref.diffusion.shaping import parse_shaping
from flax_pref.diffusion.sigma_solvers import euler
from flax_pref.diffusion.timestep_solvers import pndm

ABAR = SCHEDULE.alphas_cumprod


def size(x):
    return np.sqrt((x**2).sum(axis=(1, 2, 3)))[:, None, None, None]


class Cap:
    def __init__(self, share):
        self.share = share

    def __call__(self, d, x, abar, empty, text, guided):
        most = self.share * size(guided - empty)
        return np.where(size(d) > most, d / size(d) * most, d)


class Orthogonal:
    def __call__(self, d, x, abar, empty, text, guided):
        unit = (text - empty) / size(text - empty)
        return d - (d * unit).sum(axis=(1, 2, 3))[:, None, None, None] * unit


class Decay:
    def __init__(self, alpha):
        self.alpha = alpha

    def __call__(self, d, x, abar, empty, text, guided):
        return d * np.exp(-self.alpha * size(d) / size(empty))


class Apg:
    def __init__(self, parallel, radius, momentum):
        self.parallel, self.radius, self.momentum, self.before = parallel, radius, momentum, 0.0

    def __call__(self, d, x, abar, empty, text, guided):
        def clean(eps):
            return (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar)

        self.before = difference = clean(text + d) - clean(text) + self.momentum * self.before
        difference = difference * np.minimum(1, self.radius / size(difference))
        unit = clean(text) / size(clean(text))
        part = (difference * unit).sum(axis=(1, 2, 3))[:, None, None, None] * unit
        return -np.sqrt(abar / (1 - abar)) * (difference - part + self.parallel * part)


SHAPES = {
    "cap:0.3": lambda: Cap(0.3),
    "orthogonal": Orthogonal,
    "decay:0.7": lambda: Decay(0.7),
    "apg": lambda: Apg(0.0, np.inf, 0.0),
    "apg:0.4:1.5:-0.5": lambda: Apg(0.4, 1.5, -0.5),
}
SOLVERS = {
    "ddim": SOLVER,
    "euler": euler(SCHEDULE, 5),
    "dpm++": dpmpp(SCHEDULE, 6, spacing="leading"),
    "pndm": pndm(SCHEDULE, 6, steps_offset=1),
}


def per_image(x):
    return np.broadcast_to(x, len(IDS))[:, None, None, None]


def loop(shape, contrast, solver, w, s=lambda i: S, every=1, active=lambda i: True, normed=False):
    """The sampler as a Python loop in float64. `contrast(eps, s)`; w and s are functions of the step."""
    drawn = noises(solver)
    x, estimates, held, count = solver.init_noise_sigma * drawn[0], [], None, 0
    for i in range(len(solver.timesteps)):
        row = jax.tree.map(lambda table, i=i: np.asarray(table[i], np.float64), solver)
        t, seen = np.full(len(x), row.timesteps), row.input_scale * x
        prompts = {"text": TEXT, "empty": np.broadcast_to(EMPTY, TEXT.shape)}

        def eps(name, prompt, seen=seen, t=t, prompts=prompts):
            return network(name, seen, t, prompts[prompt])

        empty, text = eps("base", "empty"), eps("base", "text")
        guided = empty + per_image(s(i)) * (text - empty)
        noise_pred = guided
        if active(i):
            held = contrast(eps, per_image(s(i))) if count % every == 0 else held
            count += 1
            unit = size(guided - empty) / size(held) if normed else 1.0
            added = per_image(w(i)) * unit * held
            abar = np.interp(row.timesteps, np.arange(1000), ABAR)
            noise_pred = guided + (shape(added, seen, abar, empty, text, guided) if shape else added)
        estimates.insert(0, row.estimate_from_latents * x + row.estimate_from_pred * noise_pred)
        x = row.latents_coef * x + row.fresh_noise_coef * drawn[i + 1]
        x = x + sum(coef * estimate for coef, estimate in zip(row.estimate_coefs, estimates, strict=False))
    return x


def cpgd_contrast(eps, s):
    return sum(
        sign * (eps(n, "empty") + s * (eps(n, "text") - eps(n, "empty"))) for n, sign in (("pos", 1), ("neg", -1))
    )


def close(got, expected):
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_shaped_contrast_is_that_of_the_formula_with_every_solver(name, solver):
    solver = SOLVERS[solver]
    got = draw(cpgd(W, S, shaping=name), solver)
    close(got, loop(SHAPES[name](), cpgd_contrast, solver, lambda i: W))
    plain = draw(cpgd(W, S), solver)
    assert np.abs(got - plain).max() > 1e-3 * np.abs(plain).max()


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_act_on_schedules_reused_contrasts_and_intervals_image_by_image(name):
    values = np.float64([0.5, 1, 3])
    rule = cpgd(Schedule((values, 2 * values), "linear", 0.0, 5 / 6), S, every=2, shaping=name)
    expected = loop(
        SHAPES[name](), cpgd_contrast, SOLVER, lambda i: values * (1 + i / 4), every=2, active=lambda i: i < 5
    )
    close(draw(rule), expected)


@pytest.mark.parametrize("name", [None, *SHAPES])
def test_a_norm_matched_strength_is_a_share_of_what_guidance_adds(name):
    got = draw(cpgd(Schedule.parse("norm:0.4"), S, shaping=name))
    close(got, loop(SHAPES[name]() if name else None, cpgd_contrast, SOLVER, lambda i: 0.4, normed=True))


def test_a_norm_matched_strength_fits_modules_of_any_length():
    def stretched(networks, latents, timesteps, text):
        base = network("base", latents[:, 0], timesteps, text[:, 0])
        return (
            jax.numpy.stack(
                [
                    base_r
                    + (1 if name == "base" else 5) * (network(name, latents[:, r], timesteps, text[:, r]) - base_r)
                    for r, name in enumerate(networks)
                    for base_r in [network("base", latents[:, r], timesteps, text[:, r])]
                ],
                axis=1,
            )
            + 0 * base[:, None]
        )

    rule = cpgd(Schedule.parse("norm:0.4"), S)
    np.testing.assert_allclose(draw(rule, predict=stretched), draw(rule), rtol=2e-4, atol=2e-4)
    assert np.abs(draw(cpgd(W, S), predict=stretched) - draw(cpgd(W, S))).max() > 0.1


def test_shapes_with_guidance_off_in_part_see_the_empty_prompt_there():
    """Outside the interval of s guidance is off, but what w adds is still measured against text - empty."""
    rule = cpgd(W, Schedule((S,), start=0.5), shaping="cap:0.3")
    close(draw(rule), loop(Cap(0.3), cpgd_contrast, SOLVER, lambda i: W, s=lambda i: S if i >= 3 else 1.0))


def test_a_shape_asks_for_no_further_prediction():
    for rule in (cpgd, cpgd_conditional, pgd):
        assert tabulate(rule(W, S, shaping="cap:0.5"), 6, 1).evaluations == tabulate(rule(W, S), 6, 1).evaluations


def test_rescaling_a_shaped_rule_goes_by_its_shaped_text_prediction():
    """At s = 1 a rule is its own text prediction: rescaled by any share, it stays what it is."""
    close(
        draw(cpgd(W, 1.0, shaping="decay:0.7", rescale=0.7)), draw(cpgd(W, 1.0, shaping="decay:0.7")).astype(np.float64)
    )


def test_numbers_of_a_shape_do_not_recompile_a_sampler():
    tables = [tabulate(cpgd(w, S, shaping=name), 6, 1) for w, name in ((1.0, "cap:0.5"), (2.0, "cap:0.1"))]
    assert jax.tree.structure(tables[0]) == jax.tree.structure(tables[1])
    other = tabulate(cpgd(1.0, S, shaping="decay:0.1"), 6, 1)
    assert jax.tree.structure(tables[0]) != jax.tree.structure(other)


def test_any_number_of_modules_have_a_strength_each():
    rule = multi({"dpo": 0.5, "pos": 2.0}, S)

    def contrast(eps, s):
        def of(n):
            return eps(n, "empty") + s * (eps(n, "text") - eps(n, "empty"))

        return 0.5 * (of("dpo") - of("base")) + 2 * (of("pos") - of("base"))

    assert rule.networks() == ("base", "dpo", "pos")
    close(draw(rule), loop(None, contrast, SOLVER, lambda i: 1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cpgd(W, S, shaping="cap"), "'cap' is no shaping; expected cap:SHARE"),
        (lambda: cpgd(W, S, shaping="cap:x"), "'cap:x' is no shaping; expected cap:SHARE"),
        (lambda: cpgd(W, S, shaping="apg:1:2:3:4"), "expected apg:PARALLEL:RADIUS:MOMENTUM"),
        (lambda: cpgd(W, S, shaping="round"), "no shaping 'round'; expected cap, orthogonal, apg, decay"),
        (lambda: cfg(S, shaping="orthogonal"), "shaping 'orthogonal': the rule has no contrast to shape"),
        (lambda: autoguidance(W, shaping="orthogonal"), "shaping 'orthogonal': .* no classifier-free guidance"),
        (lambda: autoguidance(Schedule.parse("norm:1")), "norm: .* no classifier-free guidance"),
        (lambda: cpgd(W, Schedule.parse("norm:1")), "guidance_scale .* norm"),
        (lambda: multi({}, S), "multi: no modules"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shapes_are_read_from_text():
    assert parse_shaping("cap:0.5") == ("cap", (0.5,))
    assert parse_shaping("apg:0:2.5") == ("apg", (0.0, 2.5, 0.0))
    assert parse_shaping("apg") == ("apg", (0.0, np.inf, 0.0))
