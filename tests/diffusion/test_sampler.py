import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guidance_rules import RULES, A, S, W

from flax_pref.diffusion.exponential_solvers import dpmpp
from flax_pref.diffusion.guidance import Schedule, cfg, cpgd, cpgd_conditional, pgd, tabulate
from flax_pref.diffusion.sampler import image_keys, sample, sample_trajectory, segments
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.sigma_solvers import euler, euler_ancestral
from flax_pref.diffusion.solvers import log_prob
from flax_pref.diffusion.timestep_solvers import ddim, lcm, pndm

SHAPE, TOKENS, FEATURES = (4, 3, 2), 5, 6
SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SOLVER = ddim(SCHEDULE, 6, steps_offset=1, set_alpha_to_one=False)
STOCHASTIC = ddim(SCHEDULE, 6, eta=1.0, steps_offset=1, set_alpha_to_one=False)
NETWORKS = ("base", "dpo", "pos", "neg")
RNG = np.random.default_rng(0)
# A network is linear in latents and text, and depends on the timestep.
MIX = {name: RNG.standard_normal((2, 2)).astype(np.float32) / 2 for name in NETWORKS}
READ = {name: RNG.standard_normal((FEATURES, 2)).astype(np.float32) / 5 for name in NETWORKS}
TEXT = RNG.standard_normal((3, TOKENS, FEATURES), dtype=np.float32)
EMPTY = RNG.standard_normal((TOKENS, FEATURES), dtype=np.float32)
IDS = [7, 3, 2**31 + 5]


def network(name, x, t, text):
    return x @ MIX[name] * (1 - t / 2000)[:, None, None, None] + (text.mean(1) @ READ[name])[:, None, None, :]


def predict(networks, latents, timesteps, text):
    rows = [network(name, latents[:, r], timesteps, text[:, r]) for r, name in enumerate(networks)]
    return jnp.stack(rows, axis=1)


def draw(rule, solver=SOLVER, ids=IDS, text=TEXT, seed=0, predict=predict):
    keys = image_keys(seed, ids)
    table = tabulate(rule, len(solver.timesteps), len(ids))
    return np.asarray(sample(predict, table, solver, keys, text, EMPTY, SHAPE))


def noises(solver, seed=0):
    """The draws of the images, `[1 + S, B, H, W, C]`."""
    keys = image_keys(seed, IDS)
    steps = range(1 + len(solver.timesteps))
    drawn = [[jax.random.normal(jax.random.fold_in(key, i), SHAPE) for key in keys] for i in steps]
    return np.array(drawn, np.float64)


def kinds(text, empty, blank):
    """What each kind of prompt stands for."""
    empty, blank = (np.broadcast_to(x, text.shape) for x in (empty, blank))
    return {"text": text, "empty": empty, "proxy": (1 + A) * blank - A * text}


def loop(guide, solver, noises, own_prompts=()):
    """The sampler as a Python loop in float64: `guide(i, eps)` makes one prediction of many in step i."""
    x, estimates = solver.init_noise_sigma * noises[0], []
    prompts = {name: kinds(TEXT, EMPTY, EMPTY) for name in NETWORKS}
    prompts |= {name: kinds(*own) for name, own in dict(own_prompts).items()}
    for i in range(len(solver.timesteps)):
        row = jax.tree.map(lambda table, i=i: np.asarray(table[i], np.float64), solver)
        t = np.full(len(x), row.timesteps)
        # numpy computes as it is called: x and t of this step.
        noise_pred = guide(
            i, lambda name, prompt, x=row.input_scale * x, t=t: network(name, x, t, prompts[name][prompt])
        )
        estimates.insert(0, row.estimate_from_latents * x + row.estimate_from_pred * noise_pred)
        x = row.latents_coef * x + row.fresh_noise_coef * noises[i + 1]
        # There are fewer estimates than coefficients in the first steps.
        x = x + sum(coef * estimate for coef, estimate in zip(row.estimate_coefs, estimates, strict=False))
    return x


def check(got, guide, solver):
    expected = loop(guide, solver, noises(solver))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "solver",
    [SOLVER, STOCHASTIC, euler(SCHEDULE, 5), dpmpp(SCHEDULE, 6, spacing="leading"), pndm(SCHEDULE, 6, steps_offset=1)],
    ids=["ddim", "ddim eta=1", "euler", "dpm++", "pndm"],
)
@pytest.mark.parametrize("name", ["cfg", "pgd", "cpgd"])
def test_the_scan_is_the_loop_of_the_paper_with_every_solver(solver, name):
    rule, formula = RULES[name]
    check(draw(rule(W, S), solver), lambda i, eps: formula(eps, W, S), solver)


@pytest.mark.parametrize("name", RULES)
def test_the_scan_is_the_loop_of_the_paper_with_every_rule(name):
    rule, formula = RULES[name]
    check(draw(rule(W, S)), lambda i, eps: formula(eps, W, S), SOLVER)


@pytest.mark.parametrize("name", RULES)
def test_strengths_follow_their_schedules_image_by_image(name):
    rule, formula = RULES[name]
    w, s = np.float64([0, 1, 3]), np.float64([1, 2, 4])
    got = draw(rule(Schedule((w, 2 * w), "linear"), Schedule((s, s / 2), "cosine")))
    way = np.arange(6) / 5
    w_at = w * (1 + way)[:, None]
    s_at = s * (1 - (1 - np.cos(np.pi * way)) / 4)[:, None]
    check(got, lambda i, eps: formula(eps, *(x[i][:, None, None, None] for x in (w_at, s_at))), SOLVER)


@pytest.mark.parametrize("name", ["fine-tuned", "pgd", "cpgd", "cpgd conditional", "chats"])
def test_networks_may_see_prompts_of_their_own(name):
    rule, formula = RULES[name]
    rng = np.random.default_rng(1)
    own = {
        network: tuple(rng.standard_normal(shape, dtype=np.float32) for shape in (TEXT.shape, EMPTY.shape, EMPTY.shape))
        for network in ("pos", "dpo")
    }
    table = tabulate(rule(W, S), len(SOLVER.timesteps), len(IDS))
    drawn = sample(predict, table, SOLVER, image_keys(0, IDS), TEXT, EMPTY, SHAPE, own_prompts=own)
    expected = loop(lambda i, eps: formula(eps, W, S), SOLVER, noises(SOLVER), own)
    np.testing.assert_allclose(drawn, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_batch_of_strengths_is_the_images_drawn_one_by_one():
    swept = draw(cpgd([0.0, 1.0, 3.0], S))
    for i, w in enumerate([0.0, 1.0, 3.0]):
        np.testing.assert_allclose(swept[i], draw(cpgd(w, S))[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pgd", "cpgd", "cpgd conditional", "autoguidance"])
def test_an_interval_switches_the_contrast_off_outside(name):
    rule, formula = RULES[name]
    got = draw(rule(Schedule((W,), start=1 / 6, stop=4 / 6), S))
    check(got, lambda i, eps: formula(eps, W if 1 <= i < 4 else 0.0, S), SOLVER)


def test_outside_the_interval_of_the_guidance_scale_the_prompt_alone_counts():
    got = draw(cpgd(W, Schedule((S,), start=0.5)))
    check(got, lambda i, eps: RULES["cpgd"][1](eps, W, S if i >= 3 else 1.0), SOLVER)


@pytest.mark.parametrize("between", ["hold", "extrapolate"])
@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_a_contrast_is_reused_between_its_predictions(every, between):
    steps, known = ddim(SCHEDULE, 9), []

    def guide(i, eps):
        if i % every == 0:
            known.append(RULES["cpgd"][1](eps, 1.0, S) - RULES["cfg"][1](eps, 1.0, S))
        contrast = known[-1]
        if between == "extrapolate" and len(known) > 1:
            contrast = contrast + (i % every) / every * (known[-1] - known[-2])
        return RULES["cfg"][1](eps, 1.0, S) + (1 + i / 8) * contrast

    check(draw(cpgd(Schedule((1, 2), "linear"), S, every=every, between=between), steps), guide, steps)


# ----------------------------------------------------------------------------------------------------------------------
# Guidance rescale (arXiv:2305.08891, equations 15 and 16)


def rescaled(noise_pred, text_pred, phi):
    factor = text_pred.std((1, 2, 3)) / noise_pred.std((1, 2, 3))
    return phi * factor[:, None, None, None] * noise_pred + (1 - phi) * noise_pred


# The text prediction that a rule's guided prediction is made of.
TEXT_OF = {
    "cfg": lambda eps, w: eps("base", "text"),
    "fine-tuned": lambda eps, w: eps("dpo", "text"),
    "pgd": lambda eps, w: eps("base", "text") + w * (eps("dpo", "text") - eps("base", "text")),
    "pgd of another base": lambda eps, w: eps("base", "text") + w * (eps("dpo", "text") - eps("neg", "text")),
    "cpgd": lambda eps, w: eps("base", "text") + w * (eps("pos", "text") - eps("neg", "text")),
    "cpgd, a strength for each module": lambda eps, w: (
        eps("base", "text")
        + w * (eps("pos", "text") - eps("base", "text"))
        + 0.7 * (eps("base", "text") - eps("neg", "text"))
    ),
    "cpgd conditional": lambda eps, w: eps("base", "text") + w * (eps("pos", "text") - eps("neg", "text")),
    "positive only": lambda eps, w: eps("base", "text") + w * (eps("pos", "text") - eps("base", "text")),
    "negative only": lambda eps, w: eps("base", "text") + w * (eps("base", "text") - eps("neg", "text")),
    "multi": lambda eps, w: (
        eps("base", "text")
        + w * (eps("dpo", "text") - eps("base", "text"))
        + 0.7 * (eps("pos", "text") - eps("base", "text"))
    ),
    "npo": lambda eps, w: eps("pos", "text"),
    "chats": lambda eps, w: eps("pos", "text"),
    "autoguidance": lambda eps, w: eps("neg", "text") + w * (eps("base", "text") - eps("neg", "text")),
}


@pytest.mark.parametrize("between", ["hold", "extrapolate"])
@pytest.mark.parametrize("every", [1, 3])
def test_each_strength_has_its_own_course_and_interval(every, between):
    pos, neg = Schedule((1, 3), "linear", stop=0.7), Schedule((2.0,), start=0.25)
    steps, known = ddim(SCHEDULE, 8), {"pos": [], "neg": []}

    def guide(i, eps):
        guided = RULES["cfg"][1](eps, 1.0, S)
        for name, schedule, sign in (("pos", pos, 1), ("neg", neg, -1)):
            if i % every == 0:
                known[name].append(sign * contrast_of(name, eps))
            contrast = known[name][-1]
            if between == "extrapolate" and len(known[name]) > 1:
                contrast = contrast + (i % every) / every * (known[name][-1] - known[name][-2])
            guided = guided + schedule.at(8, 0.0)[i, 0] * contrast
        return guided

    def contrast_of(name, eps):
        module = (1 - S) * eps(name, "empty") + S * eps(name, "text")
        return module - RULES["cfg"][1](eps, 1.0, S)

    check(draw(cpgd({"pos": pos, "neg": neg}, S, every=every, between=between), steps), guide, steps)


def test_a_module_whose_strength_is_off_is_not_evaluated():
    steps = ddim(SCHEDULE, 10)
    rule = cpgd({"pos": Schedule((W,), stop=0.5), "neg": Schedule((W,), start=0.8)}, S)
    assert counted(rule, steps) == {"base": 20, "pos": 10, "neg": 4}


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", RULES)
def test_rescale_brings_the_deviation_back_to_that_of_the_text_prediction_with_its_contrast(name, phi):
    rule, formula = RULES[name]
    got = draw(rule(W, S, rescale=phi))
    check(got, lambda i, eps: rescaled(formula(eps, W, S), TEXT_OF[name](eps, W), phi), SOLVER)


@pytest.mark.parametrize("w", [Schedule((W,), start=1 / 6, stop=4 / 6), Schedule((0.5, W), "linear"), [0.5, 1.0, W]])
def test_rescale_goes_by_the_strength_of_each_step_and_image(w):
    strength = np.array(w)[:, None, None, None] if isinstance(w, list) else w.at(6, 0.0)[:, 0]

    def guide(i, eps):
        now = strength if isinstance(w, list) else strength[i]
        return rescaled(RULES["cpgd"][1](eps, now, S), TEXT_OF["cpgd"](eps, now), 0.7)

    check(draw(cpgd(w, S, rescale=0.7)), guide, SOLVER)


@pytest.mark.parametrize("between", ["hold", "extrapolate"])
@pytest.mark.parametrize("name", ["pgd", "cpgd", "cpgd conditional", "positive only", "negative only"])
def test_rescale_goes_by_the_contrast_that_is_held_or_extrapolated(name, between):
    steps, (rule, formula), known = ddim(SCHEDULE, 7), RULES[name], []

    def guide(i, eps):
        if i % 3 == 0:
            pair = formula(eps, 1.0, S) - formula(eps, 0.0, S), TEXT_OF[name](eps, 1.0) - TEXT_OF[name](eps, 0.0)
            known.append(np.array(pair))
        contrast = known[-1]
        if between == "extrapolate" and len(known) > 1:
            contrast = contrast + (i % 3) / 3 * (known[-1] - known[-2])
        guided, text = (formula(eps, 0.0, S), TEXT_OF[name](eps, 0.0)) + W * contrast
        return rescaled(guided, text, 0.7)

    check(draw(rule(W, S, rescale=0.7, every=3, between=between), steps), guide, steps)


@pytest.mark.parametrize("options", [{}, {"every": 3}, {"every": 3, "between": "extrapolate"}])
def test_rescaled_guidance_by_a_module_at_w_1_is_rescaled_guidance_of_the_module(options):
    """PGD at w = 1 is the fine-tuned network, however it is rescaled; so are the one-sided rules of one module."""
    kinds = {"rescale": 0.7, **options}
    # A contrast that is held is exact only where it does not change: here networks do not depend on x or t.
    networks = predict if not options else lambda names, x, t, text: predict(names, jnp.ones_like(x), 0 * t, text)
    for module, rule in (("dpo", pgd(1.0, S, **kinds)), ("pos", cpgd(1.0, S, negative="base", **kinds))):
        expected = draw(cfg(S, module, rescale=0.7), predict=networks)
        np.testing.assert_allclose(draw(rule, predict=networks), expected, rtol=1e-5, atol=1e-5)


def counted(rule, solver):
    """The image, and how many predictions of each network were made for it when it ran."""
    counts = collections.Counter()

    def counting(networks, latents, timesteps, text):
        jax.debug.callback(lambda: counts.update(networks))
        return predict(networks, latents, timesteps, text)

    draw(rule, solver, predict=counting)
    jax.effects_barrier()
    return counts


def test_outside_of_its_interval_a_module_is_not_evaluated():
    steps = ddim(SCHEDULE, 10)
    assert counted(cpgd(W, S), steps) == {"base": 20, "pos": 20, "neg": 20}
    assert counted(cpgd(Schedule((W,), start=0.2, stop=0.5), S), steps) == {"base": 20, "pos": 6, "neg": 6}
    assert counted(cpgd_conditional(W, S), steps) == {"base": 20, "pos": 10, "neg": 10}
    assert counted(cpgd(W, S, every=4), steps) == {"base": 20, "pos": 6, "neg": 6}
    assert counted(cpgd(W, Schedule((S,), stop=0.5)), steps) == {"base": 15, "pos": 15, "neg": 15}


def test_plans_are_gone_through_in_few_scans():
    plans = "AAAABCCBCCBCC"
    assert segments(tuple(plans)) == [(("A",), 4), (("B", "C", "C"), 3)]
    for plans in ("A", "AB", "ABAB", "RHHRHHR", "AAABAAABB", "".join(np.random.default_rng(0).choice(list("AB"), 40))):
        assert "".join("".join(cycle) * repeats for cycle, repeats in segments(tuple(plans))) == plans


@pytest.mark.parametrize(
    "solver",
    [SOLVER, STOCHASTIC, euler_ancestral(SCHEDULE, 4), lcm(SCHEDULE, 4), dpmpp(SCHEDULE, 4, sde=True)],
    ids=["ddim", "ddim eta=1", "euler_a", "lcm", "dpm++_sde"],
)
def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(solver):
    rows = cpgd(2.0, 3.0)
    together = draw(rows, solver)
    alone = draw(rows, solver, IDS[:1], TEXT[:1])
    padded = draw(rows, solver, [IDS[2], IDS[1], IDS[1]], TEXT[[2, 1, 1]])
    others = np.concatenate([alone, padded[[1, 0]]])
    np.testing.assert_allclose(together, others, rtol=1e-5, atol=1e-5 * max(1, np.abs(others).max()))


def test_an_image_depends_on_its_seed_and_prompt_id():
    images = np.concatenate([draw(cfg(3.0), seed=seed, ids=[0, 1, 2], text=TEXT[[0, 0, 0]]) for seed in (0, 1)])
    assert len(np.unique(images.round(3), axis=0)) == 6


@pytest.mark.parametrize(
    ("rule", "same"),
    [
        (cpgd(0.0, 3.0), cfg(3.0)),
        (pgd(0.0, 3.0), cfg(3.0)),
        (pgd(1.0, 3.0), cfg(3.0, "dpo")),
        (cpgd(5.0, 3.0, "pos", "pos"), cfg(3.0)),
    ],
    ids=["cpgd w=0", "pgd w=0", "pgd w=1", "cpgd with equal modules"],
)
def test_rules_meet_where_they_should(rule, same):
    np.testing.assert_allclose(draw(rule), draw(same), rtol=1e-5, atol=1e-5)


def test_equal_positive_and_negative_weights_give_the_base_image(monkeypatch):
    monkeypatch.setitem(MIX, "neg", MIX["pos"])
    monkeypatch.setitem(READ, "neg", READ["pos"])
    np.testing.assert_allclose(draw(cpgd(5.0, 3.0)), draw(cfg(3.0)), rtol=1e-4, atol=1e-4)


def test_all_rows_share_one_call_per_step_and_eight_strengths_compile_once():
    calls = []

    def counting(networks, latents, timesteps, text):
        calls.append((networks, latents.shape))
        return predict(networks, latents, timesteps, text)

    @jax.jit
    def run(table):
        return sample(counting, table, SOLVER, image_keys(0, IDS), TEXT, EMPTY, shape=SHAPE)

    strengths = [0.0, 0.5, 2, 8, [0.0, 1.0, 2.0], Schedule((0, 4), "linear"), Schedule((4, 0), "cosine")]
    strengths.append(Schedule(tuple(range(6)), "list"))
    swept = [run(tabulate(cpgd(w, s), 6, len(IDS))) for w, s in zip(strengths, strengths[::-1], strict=True)]
    assert calls == [(("base", "base", "pos", "pos", "neg", "neg"), (len(IDS), 6, *SHAPE))]
    assert run._cache_size() == 1
    np.testing.assert_allclose(swept[5], draw(cpgd(strengths[5], strengths[2])), rtol=1e-4, atol=1e-5)


def test_a_solver_may_be_an_argument_of_the_compiled_function():
    table, keys = tabulate(cfg(3.0), 6, len(IDS)), image_keys(0, IDS)
    run = jax.jit(lambda solver: sample(predict, table, solver, keys, TEXT, EMPTY, SHAPE))
    np.testing.assert_allclose(run(STOCHASTIC), draw(cfg(3.0), STOCHASTIC), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "solvers",
    [
        [dpmpp(SCHEDULE, 6, sigmas="karras" if karras else None) for karras in (False, True)],
        [euler(SCHEDULE, 6, sigmas="karras" if karras else None) for karras in (False, True)],
        [ddim(SCHEDULE, 6, eta=eta) for eta in (0.2, 1.0)],
        [pndm(SCHEDULE, 6, spacing=spacing) for spacing in ("leading", "trailing")],
    ],
    ids=["dpm++", "euler", "ddim", "pndm"],
)
def test_solvers_of_one_kind_and_length_compile_once(solvers):
    traces, keys = [], image_keys(0, IDS)
    table = tabulate(cfg(3.0), len(solvers[0].timesteps), len(IDS))

    @jax.jit
    def run(solver):
        traces.append(solver)
        return sample(predict, table, solver, keys, TEXT, EMPTY, SHAPE)

    one, other = map(run, solvers)
    assert len(traces) == 1
    assert np.abs(one - other).max() > 1e-3


def scans(solver):
    table = tabulate(cfg(3.0), len(solver.timesteps), len(IDS))
    jaxpr = jax.make_jaxpr(lambda text: sample(predict, table, solver, image_keys(0, IDS), text, EMPTY, SHAPE))(TEXT)
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]


@pytest.mark.parametrize(
    ("solver", "carried"),
    [(SOLVER, 1), (STOCHASTIC, 1), (euler(SCHEDULE, 5), 1), (dpmpp(SCHEDULE, 5), 2), (pndm(SCHEDULE, 5), 5)],
    ids=["ddim", "ddim eta=1", "euler", "dpm++", "pndm"],
)
def test_the_scan_carries_no_more_latents_than_the_solver_needs_and_keeps_none(solver, carried):
    (scan,) = scans(solver)
    assert [out.aval.shape for out in scan.outvars] == [(len(IDS), *SHAPE)] * carried


def test_only_a_stochastic_solver_draws_noise_in_its_steps():
    def drawn(solver):
        (scan,) = scans(solver)
        return "random_bits" in str(scan)

    assert drawn(STOCHASTIC)
    assert not drawn(SOLVER)


def test_the_trajectory_leads_to_the_image_and_its_log_probabilities_are_those_of_its_steps():
    table, keys = tabulate(cpgd(2.0, 3.0), 6, len(IDS)), image_keys(0, IDS)
    args = (predict, table, STOCHASTIC, keys, TEXT, EMPTY, SHAPE)
    latents, log_probs = sample_trajectory(*args)
    steps = len(STOCHASTIC.timesteps)
    assert latents.shape == (steps + 1, len(IDS), *SHAPE)
    assert log_probs.shape == (steps, len(IDS))
    np.testing.assert_allclose(latents[-1], sample(*args), rtol=1e-6, atol=1e-6)
    empty = np.broadcast_to(EMPTY, TEXT.shape)
    for i in range(steps):
        row, x = jax.tree.map(lambda table, i=i: table[i], STOCHASTIC), latents[i]
        t = np.full(len(IDS), row.timesteps)
        prompts = {"text": TEXT, "empty": empty}
        noise_pred = RULES["cpgd"][1](lambda name, prompt, x=x, t=t: network(name, x, t, prompts[prompt]), 2.0, 3.0)  # noqa: B023
        np.testing.assert_allclose(log_probs[i], log_prob(latents[i + 1], x, noise_pred, row), rtol=1e-3, atol=1e-3)
        # z^2 averages to 1 over the dimensions of all images, which is what the density of each step is made of.
        assert np.mean(log_probs[i] + np.log(row.fresh_noise_coef)) == pytest.approx(-1.42, abs=0.35)


def test_a_trajectory_of_a_solver_that_draws_no_noise_is_refused():
    table = tabulate(cfg(3.0), 6, len(IDS))
    with pytest.raises(ValueError, match=r"sample_trajectory: the solver draws no noise.*take ddim with eta > 0"):
        sample_trajectory(predict, table, SOLVER, image_keys(0, IDS), TEXT, EMPTY, SHAPE)


def test_a_trajectory_whose_steps_depend_on_those_before_is_refused():
    with pytest.raises(ValueError, match="depend on those before them and have no density of their own; take ddim"):
        sample_trajectory(
            predict,
            tabulate(cfg(S), 4, 3),
            dpmpp(SCHEDULE, 4, sde=True),
            image_keys(0, IDS),
            TEXT,
            EMPTY,
            SHAPE,
        )


def test_conditioning_may_be_a_tree_as_sdxl_needs_it():
    def predict_tree(networks, latents, timesteps, conditioning):
        assert conditioning["time_ids"].shape == (len(IDS), 2, 6)
        return predict(networks, latents, timesteps, conditioning["hidden"])

    table, keys = tabulate(cfg(3.0), 6, len(IDS)), image_keys(0, IDS)
    text = {"hidden": TEXT, "time_ids": np.ones((len(IDS), 6), np.float32)}
    empty = {"hidden": EMPTY, "time_ids": np.ones(6, np.float32)}
    latents = sample(predict_tree, table, SOLVER, keys, text, empty, SHAPE)
    np.testing.assert_array_equal(latents, draw(cfg(3.0)))


def test_the_noise_of_an_image_survives_another_default_generator():
    with jax.default_prng_impl("rbg"):
        changed = draw(cfg(3.0))
    np.testing.assert_array_equal(changed, draw(cfg(3.0)))


def test_what_does_not_fit_is_refused():
    keys = image_keys(0, IDS)
    table = tabulate(cfg(3.0), 6, len(IDS))
    with pytest.raises(ValueError, match=r"a table of 6 steps and 3 images, but the solver has 5 steps and .* 3 keys"):
        sample(predict, table, euler(SCHEDULE, 5), keys, TEXT, EMPTY, SHAPE)
    with pytest.raises(ValueError, match=r"3 keys, but text has shape \[2, 5, 6\]"):
        sample(predict, table, SOLVER, keys, TEXT[:2], EMPTY, SHAPE)
    with pytest.raises(ValueError, match="prompt_id must lie in"):
        image_keys(0, [1, -1])
    with pytest.raises(ValueError, match=r"seed must lie in .*, got 4294967296"):
        image_keys(2**32, [0])
