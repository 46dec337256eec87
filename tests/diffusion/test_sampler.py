import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_pref.diffusion.guidance import cfg, coefficients, cpgd, layout, pgd
from flax_pref.diffusion.sampler import image_key, image_keys, sample, sample_trajectory
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.solvers import ddim, dpmpp, euler, log_prob, pndm

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


def predict(networks, latents, timesteps, encoder_hidden_states):
    groups = [jnp.split(rows, len(networks)) for rows in (latents, timesteps, encoder_hidden_states)]
    return jnp.concatenate([network(name, *rows) for name, *rows in zip(networks, *groups, strict=True)])


def draw(rows, solver=SOLVER, ids=IDS, text=TEXT, seed=0, predict=predict):
    keys = image_keys(seed, ids)
    return np.asarray(sample(predict, layout(rows), coefficients(rows), solver, keys, text, EMPTY, SHAPE))


def loop(rows, solver, noises):
    """The sampler as a Python loop over steps and rows in float64, given its noise `[1 + S, B, H, W, C]`."""
    x = solver.init_noise_sigma * noises[0]
    empty, estimates = np.broadcast_to(EMPTY, TEXT.shape), []
    for i in range(len(solver.timesteps)):
        row = jax.tree.map(lambda table, i=i: np.asarray(table[i], np.float64), solver)
        noise_pred = 0
        for name, prompt, coefficient in rows:
            t = np.full(len(x), row.timesteps)
            noise_pred += coefficient * network(name, row.input_scale * x, t, TEXT if prompt == "text" else empty)
        estimates.insert(0, row.estimate_from_latents * x + row.estimate_from_pred * noise_pred)
        x = row.latents_coef * x + row.fresh_noise_coef * noises[i + 1]
        # There are fewer estimates than coefficients in the first steps.
        x = x + sum(coef * estimate for coef, estimate in zip(row.estimate_coefs, estimates, strict=False))
    return x


@pytest.mark.parametrize(
    "solver",
    [SOLVER, STOCHASTIC, euler(SCHEDULE, 5), dpmpp(SCHEDULE, 6, spacing="leading"), pndm(SCHEDULE, 6, steps_offset=1)],
    ids=["ddim", "ddim eta=1", "euler", "dpm++", "pndm"],
)
@pytest.mark.parametrize("rows", [cfg(3.0), pgd(1.7, 3.0), cpgd(2.0, 3.0)], ids=["cfg", "pgd", "cpgd"])
def test_the_scan_is_the_loop_of_the_paper(solver, rows):
    keys = [image_key(0, i) for i in IDS]
    noises = np.array(
        [
            [jax.random.normal(jax.random.fold_in(key, i), SHAPE) for key in keys]
            for i in range(1 + len(solver.timesteps))
        ],
        np.float64,
    )
    expected = loop(rows, solver, noises)
    got = draw(rows, solver)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("solver", [SOLVER, STOCHASTIC], ids=["ddim", "ddim eta=1"])
def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(solver):
    rows = cpgd(2.0, 3.0)
    together = draw(rows, solver)
    alone = draw(rows, solver, IDS[:1], TEXT[:1])
    padded = draw(rows, solver, [IDS[2], IDS[1], IDS[1]], TEXT[[2, 1, 1]])
    np.testing.assert_allclose(together, np.concatenate([alone, padded[[1, 0]]]), rtol=1e-6, atol=1e-6)


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


def test_all_rows_share_one_call_per_step_and_a_sweep_compiles_once():
    calls = []

    def counting(networks, latents, timesteps, text):
        calls.append((networks, latents.shape))
        return predict(networks, latents, timesteps, text)

    rows = cpgd(0.0, 3.0)
    run = jax.jit(
        lambda coefficients: sample(
            counting, layout(rows), coefficients, SOLVER, image_keys(0, IDS), TEXT, EMPTY, shape=SHAPE
        )
    )
    swept = [run(coefficients(cpgd(w, 3.0))) for w in (0.0, 0.5, 2.0)]
    assert calls == [(("base", "base", "pos", "pos", "neg", "neg"), (6 * len(IDS), *SHAPE))]
    np.testing.assert_allclose(swept[2], draw(cpgd(2.0, 3.0)), rtol=1e-4, atol=1e-5)


def test_a_solver_may_be_an_argument_of_the_compiled_function():
    rows, keys = cfg(3.0), image_keys(0, IDS)
    run = jax.jit(lambda solver: sample(predict, layout(rows), coefficients(rows), solver, keys, TEXT, EMPTY, SHAPE))
    np.testing.assert_allclose(run(STOCHASTIC), draw(rows, STOCHASTIC), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "solvers",
    [
        [dpmpp(SCHEDULE, 6, karras=karras) for karras in (False, True)],
        [euler(SCHEDULE, 6, karras=karras) for karras in (False, True)],
        [ddim(SCHEDULE, 6, eta=eta) for eta in (0.2, 1.0)],
        [pndm(SCHEDULE, 6, spacing=spacing) for spacing in ("leading", "trailing")],
    ],
    ids=["dpm++", "euler", "ddim", "pndm"],
)
def test_solvers_of_one_kind_and_length_compile_once(solvers):
    traces, rows, keys = [], cfg(3.0), image_keys(0, IDS)

    @jax.jit
    def run(solver):
        traces.append(solver)
        return sample(predict, layout(rows), coefficients(rows), solver, keys, TEXT, EMPTY, SHAPE)

    one, other = map(run, solvers)
    assert len(traces) == 1
    assert np.abs(one - other).max() > 1e-3


def scans(solver):
    jaxpr = jax.make_jaxpr(
        lambda text: sample(predict, (("base", "text"),), [1.0], solver, image_keys(0, IDS), text, EMPTY, SHAPE)
    )(TEXT)
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
    rows, keys = cpgd(2.0, 3.0), image_keys(0, IDS)
    args = (predict, layout(rows), coefficients(rows), STOCHASTIC, keys, TEXT, EMPTY, SHAPE)
    latents, log_probs = sample_trajectory(*args)
    steps = len(STOCHASTIC.timesteps)
    assert latents.shape == (steps + 1, len(IDS), *SHAPE)
    assert log_probs.shape == (steps, len(IDS))
    np.testing.assert_allclose(latents[-1], sample(*args), rtol=1e-6, atol=1e-6)
    empty = np.broadcast_to(EMPTY, TEXT.shape)
    for i in range(steps):
        row, x = jax.tree.map(lambda table, i=i: table[i], STOCHASTIC), latents[i]
        t = np.full(len(IDS), row.timesteps)
        noise_pred = sum(
            coefficient * network(name, x, t, TEXT if prompt == "text" else empty) for name, prompt, coefficient in rows
        )
        np.testing.assert_allclose(log_probs[i], log_prob(latents[i + 1], x, noise_pred, row), rtol=1e-3, atol=1e-3)
        # z^2 averages to 1 over the dimensions of all images, which is what the density of each step is made of.
        assert np.mean(log_probs[i] + np.log(row.fresh_noise_coef)) == pytest.approx(-1.42, abs=0.35)


def test_a_trajectory_of_a_solver_that_draws_no_noise_is_refused():
    rows = cfg(3.0)
    with pytest.raises(ValueError, match=r"sample_trajectory: the solver draws no noise.*take ddim with eta > 0"):
        sample_trajectory(predict, layout(rows), coefficients(rows), SOLVER, image_keys(0, IDS), TEXT, EMPTY, SHAPE)


def test_coefficients_may_vary_over_the_steps():
    early = np.linspace(0, 1, len(SOLVER.timesteps)) < 0.5
    table = np.where(early[:, None], coefficients(cpgd(2.0, 3.0)), coefficients(cpgd(0.0, 3.0)))
    args = (SOLVER, image_keys(0, IDS), TEXT, EMPTY, SHAPE)
    varied = sample(predict, layout(cpgd(2.0, 3.0)), table, *args)
    constant = sample(predict, layout(cpgd(2.0, 3.0)), np.repeat(table[:1], len(table), 0), *args)
    np.testing.assert_allclose(constant, draw(cpgd(2.0, 3.0)), rtol=1e-5, atol=1e-5)
    assert np.abs(varied - constant).max() > 1e-2


def test_conditioning_may_be_a_tree_as_sdxl_needs_it():
    def predict_tree(networks, latents, timesteps, conditioning):
        assert conditioning["time_ids"].shape == (2 * len(IDS), 6)
        return predict(networks, latents, timesteps, conditioning["hidden"])

    rows, keys = cfg(3.0), image_keys(0, IDS)
    text = {"hidden": TEXT, "time_ids": np.ones((len(IDS), 6), np.float32)}
    empty = {"hidden": EMPTY, "time_ids": np.ones(6, np.float32)}
    latents = sample(predict_tree, layout(rows), coefficients(rows), SOLVER, keys, text, empty, SHAPE)
    np.testing.assert_array_equal(latents, draw(rows))


def test_the_noise_of_an_image_survives_another_default_generator():
    with jax.default_prng_impl("rbg"):
        changed = draw(cfg(3.0))
    np.testing.assert_array_equal(changed, draw(cfg(3.0)))


def test_what_does_not_fit_is_refused():
    keys = image_keys(0, IDS)
    with pytest.raises(ValueError, match=r"2 rows and 6 steps must be \[2\] or \[6, 2\], got \[3\]"):
        sample(predict, layout(cfg(3.0)), np.ones(3), SOLVER, keys, TEXT, EMPTY, SHAPE)
    with pytest.raises(ValueError, match=r"3 keys, but text has shape \[2, 5, 6\]"):
        sample(predict, layout(cfg(3.0)), np.ones(2), SOLVER, keys, TEXT[:2], EMPTY, SHAPE)
    with pytest.raises(ValueError, match="prompt of network 'base' must be \"text\" or \"empty\", got 'null'"):
        sample(predict, (("base", "null"),), np.ones(1), SOLVER, keys, TEXT, EMPTY, SHAPE)
    with pytest.raises(ValueError, match="prompt_id must lie in"):
        image_keys(0, [1, -1])
    with pytest.raises(ValueError, match=r"seed must lie in .*, got 4294967296"):
        image_key(2**32, 0)
