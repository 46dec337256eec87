import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from scheduler_walks import SD, SHAPE, assert_same_trajectory

from flax_pref.diffusion.exponential_solvers import dpmpp
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.sigma_solvers import euler
from flax_pref.diffusion.solvers import log_prob, no_history, step
from flax_pref.diffusion.timestep_solvers import ddim, pndm

# diffusers' Euler scheduler makes an array of a tensor in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.mark.parametrize("steps", [4, 7, 15, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("eta", "set_alpha_to_one"), [(0.0, False), (0.0, True), (0.7, False), (1.0, True)])
def test_ddim_walks_as_in_diffusers(steps, prediction_type, spacing, eta, set_alpha_to_one):
    config = SD | {
        "clip_sample": False,
        "prediction_type": prediction_type,
        "set_alpha_to_one": set_alpha_to_one,
        "steps_offset": 1,
        "timestep_spacing": spacing,
    }
    solver = solver_from_config(config, steps, name="ddim", eta=eta)
    assert solver.stochastic == (eta > 0)
    assert_same_trajectory(solver, DDIMScheduler(**config), steps, **({"eta": eta} if eta else {}))


@pytest.mark.parametrize("steps", [4, 7, 15, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_euler_walks_as_in_diffusers(steps, prediction_type, spacing):
    config = SD | {"prediction_type": prediction_type, "steps_offset": 1, "timestep_spacing": spacing}
    reference = EulerDiscreteScheduler(**config)
    solver = solver_from_config(config | {"_class_name": "EulerDiscreteScheduler"}, steps)
    assert_same_trajectory(solver, reference, steps)
    np.testing.assert_allclose(solver.init_noise_sigma, reference.init_noise_sigma, rtol=1e-6)


@pytest.mark.parametrize("steps", [4, 7, 15, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_euler_walks_along_karras_sigmas_as_in_diffusers(steps, prediction_type, spacing):
    config = SD | {"prediction_type": prediction_type, "steps_offset": 1, "timestep_spacing": spacing}
    reference = EulerDiscreteScheduler(**config, use_karras_sigmas=True)
    solver = solver_from_config(config, steps, name="euler_karras")
    # These timesteps are fractions, which diffusers interpolates in float32.
    assert_same_trajectory(solver, reference, steps, timestep_atol=1e-3)
    np.testing.assert_allclose(solver.init_noise_sigma, reference.init_noise_sigma, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 15, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_pndm_walks_as_in_diffusers(steps, prediction_type, spacing, set_alpha_to_one):
    config = SD | {
        "prediction_type": prediction_type,
        "set_alpha_to_one": set_alpha_to_one,
        "skip_prk_steps": True,
        "steps_offset": 1 if steps > 1 else 0,
        "timestep_spacing": spacing,
    }
    solver = solver_from_config(config | {"_class_name": "PNDMScheduler"}, steps)
    assert_same_trajectory(solver, PNDMScheduler(**config), steps)


FINALS = [
    {},
    {"lower_order_final": False},
    {"final_sigmas_type": "sigma_min"},
    {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    {"final_sigmas_type": "sigma_min", "euler_at_final": True},
]


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 15, 18, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("karras", [False, True])
def test_dpm_solver_walks_as_in_diffusers(steps, prediction_type, spacing, karras):
    for final in FINALS:
        config = SD | final | {"prediction_type": prediction_type, "steps_offset": 1, "timestep_spacing": spacing}
        reference = DPMSolverMultistepScheduler(**config, use_karras_sigmas=karras)
        solver = solver_from_config(config, steps, name="dpm++_karras" if karras else "dpm++")
        assert_same_trajectory(solver, reference, steps)
    from_file = solver_from_config(json.loads(reference.to_json_string()), steps)
    assert all(np.array_equal(*leaves) for leaves in zip(*map(jax.tree.leaves, (solver, from_file)), strict=True))


@pytest.mark.parametrize("steps", [1, 3, 333, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_unusual_numbers_of_steps_visit_the_timesteps_that_diffusers_visits(steps, spacing):
    reference = DDIMScheduler(timestep_spacing=spacing)
    reference.set_timesteps(steps)
    solver = ddim(NoiseSchedule(), steps, spacing=spacing)
    np.testing.assert_array_equal(solver.timesteps, reference.timesteps.numpy())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(solver))


@pytest.mark.parametrize("steps", [1, 3, 333, 999])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_dpm_solver_takes_unusual_numbers_of_steps(steps, spacing, karras):
    reference = DPMSolverMultistepScheduler(timestep_spacing=spacing, use_karras_sigmas=karras)
    reference.set_timesteps(steps)
    solver = dpmpp(NoiseSchedule(), steps, spacing=spacing, sigmas="karras" if karras else None)
    np.testing.assert_array_equal(solver.timesteps, reference.timesteps.numpy())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(solver))


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler]
)
def test_fields_that_a_file_leaves_out_take_the_defaults_of_diffusers(scheduler):
    extra = {DDIMScheduler: {"clip_sample": False}, PNDMScheduler: {"skip_prk_steps": True}}.get(scheduler, {})
    solver = solver_from_config(SD | extra | {"_class_name": scheduler.__name__}, 5)
    assert_same_trajectory(solver, scheduler(**SD, **extra), 5)


SD15 = SD | {"_class_name": "PNDMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
SD15 |= {"skip_prk_steps": True, "trained_betas": None, "_diffusers_version": "0.6.0"}
SDXL = SD | {"_class_name": "EulerDiscreteScheduler", "clip_sample": False, "interpolation_type": "linear"}
SDXL |= {"prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True}
SDXL |= {"steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False}


@pytest.mark.parametrize("published", [SD15, SDXL], ids=["SD1.5", "SDXL"])
@pytest.mark.parametrize(
    ("name", "scheduler", "extra"),
    [
        ("ddim", DDIMScheduler, {}),
        ("dpm++", DPMSolverMultistepScheduler, {}),
        ("dpm++_karras", DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        ("euler", EulerDiscreteScheduler, {}),
        ("pndm", PNDMScheduler, {}),
    ],
)
def test_the_published_schedulers_sample_with_every_solver(published, name, scheduler, extra):
    assert_same_trajectory(solver_from_config(published, 10, name=name), scheduler.from_config(published, **extra), 10)


def test_the_published_schedulers_sample_with_their_own_solver_by_default():
    assert_same_trajectory(solver_from_config(SD15, 10), PNDMScheduler.from_config(SD15), 10)
    assert_same_trajectory(solver_from_config(SDXL, 10), EulerDiscreteScheduler.from_config(SDXL), 10)


def test_another_scheduler_class_is_refused_with_the_names_that_may_be_asked_for():
    with pytest.raises(
        ValueError,
        match=r"_class_name='ScoreSdeVeScheduler' is not supported; supported: DDIMScheduler or DDPMScheduler or .*; "
        r"pass as name one of ddim, ddpm, deis, dpm\+\+, dpm\+\+_karras, .* to sample with that instead",
    ):
        solver_from_config(SD | {"_class_name": "ScoreSdeVeScheduler"}, 10)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("DDIMScheduler", "clip_sample", True),
        ("DDIMScheduler", "thresholding", True),
        ("DDIMScheduler", "prediction_type", "sample"),
        ("DPMSolverMultistepScheduler", "algorithm_type", "sde-dpmsolver"),
        ("DPMSolverMultistepScheduler", "final_sigmas_type", "lowest"),
        ("DPMSolverMultistepScheduler", "lambda_min_clipped", -5.1),
        ("DPMSolverMultistepScheduler", "solver_order", 4),
        ("DPMSolverMultistepScheduler", "solver_type", "euler"),
        ("DPMSolverMultistepScheduler", "use_lu_lambdas", True),
        ("EulerDiscreteScheduler", "sigma_min", 0.1),
        ("EulerDiscreteScheduler", "interpolation_type", "log_linear"),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("EulerDiscreteScheduler", "final_sigmas_type", "lowest"),
        ("PNDMScheduler", "skip_prk_steps", False),
    ],
)
def test_an_unsupported_field_is_refused_by_name_and_value(name, field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r} is not supported")):
        solver_from_config({"_class_name": name, "clip_sample": False, field: value}, 5)


def test_what_diffusers_would_do_by_default_and_we_do_not_is_refused():
    with pytest.raises(ValueError, match="clip_sample=True is not supported"):
        solver_from_config({"_class_name": "DDIMScheduler"}, 5)
    with pytest.raises(ValueError, match="skip_prk_steps=False is not supported"):
        solver_from_config({"_class_name": "PNDMScheduler"}, 5)


@pytest.mark.parametrize("make", [ddim, dpmpp, euler, pndm])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0, "spacing": "trailing"}, r"steps must lie in 1 \.\. 1000 .*, got 0"),
        ({"steps": 1001, "spacing": "trailing"}, r"steps must lie in 1 \.\. 1000 .*, got 1001"),
        ({"steps": 5, "spacing": "karras"}, "spacing must be one of leading, trailing, linspace, got 'karras'"),
        ({"steps": 999, "spacing": "leading", "steps_offset": 2}, "outside the trained 0 .. 999"),
    ],
)
def test_bad_arguments_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(NoiseSchedule(), **options)


def test_dpm_solver_says_how_many_steps_it_can_take():
    with pytest.raises(ValueError, match=r"steps must lie in 1 \.\. 999 \(num_train_timesteps=1000\), got 1000"):
        dpmpp(NoiseSchedule(), 1000)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_outside_its_range_is_refused(eta):
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], got"):
        ddim(NoiseSchedule(), 5, eta=eta)


def test_eta_and_unknown_names_are_refused_where_they_mean_nothing():
    with pytest.raises(ValueError, match=r"eta=0\.5 applies to ddim and tcd only, euler draws no noise"):
        solver_from_config(SD, 5, name="euler", eta=0.5)
    with pytest.raises(ValueError, match=r"name must be one of ddim, ddpm, .*, got 'ancestral'"):
        solver_from_config(SD, 5, name="ancestral")


def row_of(solver, i):
    return jax.tree.map(lambda column: column[i], solver)


def test_a_history_of_the_wrong_length_is_refused():
    x = jnp.ones(SHAPE)
    with pytest.raises(ValueError, match="needs the estimates of the last 1 steps, got 0; start with no_history"):
        step(x, x, row_of(dpmpp(NoiseSchedule(), 5), 0))


@pytest.mark.parametrize("solver", [ddim(NoiseSchedule(), 5, eta=0.5), pndm(NoiseSchedule(), 5)], ids=["ddim", "pndm"])
def test_images_of_one_batch_may_be_at_different_steps(solver):
    rng = np.random.default_rng(0)
    draw = [jnp.asarray(rng.standard_normal(SHAPE, dtype=np.float32)) for _ in range(7)]
    latents, noise_pred, noise, *history = draw
    history = tuple(history[: len(no_history(solver, latents))])
    steps = np.array([4, 1])
    together, estimates = step(latents, noise_pred, row_of(solver, steps), noise, history)
    for n, i in enumerate(steps):
        one = slice(n, n + 1)
        past = tuple(estimate[one] for estimate in history)
        alone, ones = step(latents[one], noise_pred[one], row_of(solver, i), noise[one], past)
        np.testing.assert_allclose(together[one], alone, rtol=1e-6, atol=1e-6)
        assert all(np.allclose(both[one], own) for both, own in zip(estimates, ones, strict=True))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_log_probabilities_are_those_of_the_step_that_diffusers_takes(prediction_type, eta):
    config = SD15 | {"prediction_type": prediction_type}
    solver = solver_from_config(config, 10, name="ddim", eta=eta)
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(10)
    rng = np.random.default_rng(0)
    taken = []
    for i, t in enumerate(scheduler.timesteps):
        x, noise_pred, z = rng.standard_normal((3, *SHAPE), dtype=np.float32)
        after, _ = step(x, noise_pred, row_of(solver, i), z)
        still = torch.zeros(SHAPE)
        mean = scheduler.step(
            torch.from_numpy(noise_pred), t, torch.from_numpy(x), eta=eta, variance_noise=still
        ).prev_sample
        std = eta * scheduler._get_variance(t, t - 100) ** 0.5
        # In float64: the last step's deviation is 1 % of the latents, and what float32 rounds off there is enlarged.
        normal = torch.distributions.Normal(mean.double(), std.double())
        expected = normal.log_prob(torch.from_numpy(np.array(after)).double()).mean((1, 2, 3))
        got = log_prob(after, jnp.asarray(x), jnp.asarray(noise_pred), row_of(solver, i))
        assert got.shape == (SHAPE[0],)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        taken.append((after, x, noise_pred, got))
    # The first image at step 2, the second at step 7.
    *arguments, expected = (jnp.stack([third[0], eighth[1]]) for third, eighth in zip(taken[2], taken[7], strict=True))
    np.testing.assert_allclose(log_prob(*arguments, row_of(solver, np.array([2, 7]))), expected, rtol=1e-5)


def test_a_step_without_noise_counts_as_log_probability_zero_with_gradient_zero():
    solver = ddim(NoiseSchedule(), 5, eta=1.0)
    last = row_of(solver, -1)
    assert last.fresh_noise_coef == 0
    x, noise_pred, after = np.random.default_rng(0).standard_normal((3, *SHAPE), dtype=np.float32)
    value, gradient = jax.value_and_grad(lambda pred: log_prob(after, x, pred, last).sum())(noise_pred)
    assert value == 0
    assert not gradient.any()


def test_a_solver_that_draws_no_noise_has_no_log_probabilities():
    x = jnp.ones(SHAPE)
    with pytest.raises(ValueError, match=r"draws no noise.*take ddim with eta > 0"):
        log_prob(x, x, x, row_of(ddim(NoiseSchedule(), 5), 0))


@pytest.mark.parametrize(
    "solvers",
    [
        [
            dpmpp(NoiseSchedule(), 6, spacing=s, sigmas="karras" if k else None)
            for s, k in itertools.product(("leading", "linspace"), (False, True))
        ],
        [euler(NoiseSchedule(), 6, sigmas="karras" if karras else None) for karras in (False, True)],
        [ddim(NoiseSchedule(), 6, eta=eta) for eta in (0.2, 1.0)],
        [pndm(schedule, 6) for schedule in (NoiseSchedule(), NoiseSchedule(prediction_type="v_prediction"))],
    ],
    ids=["dpm++", "euler", "ddim", "pndm"],
)
def test_solvers_of_one_kind_and_length_share_one_structure(solvers):
    kinds = {(jax.tree.structure(solver), *(leaf.shape for leaf in jax.tree.leaves(solver))) for solver in solvers}
    assert len(kinds) == 1
