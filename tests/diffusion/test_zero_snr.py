"""Zero terminal SNR (arXiv:2305.08891): the last timestep has no signal, and every step from it is finite."""

import dataclasses
import warnings

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from scheduler_walks import SD, SHAPE, assert_same_trajectory, trajectory

from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.scheduler_configs import CLASSES, NAMES, solver_from_config
from flax_pref.diffusion.solvers import clean_estimate, log_prob, step

# diffusers' Euler scheduler makes an array of a tensor in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
ZERO = SD | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False}
ZERO |= {"timestep_spacing": "trailing"}
# Other classes ignore the field.
RESCALING = ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler", "TCDScheduler"]
RESCALING += ["UniPCMultistepScheduler"]


def test_the_schedule_is_that_of_diffusers_and_ends_without_signal():
    schedule = NoiseSchedule.from_dict(ZERO)
    reference = rescale_zero_terminal_snr(torch.from_numpy(NoiseSchedule.from_dict(SD).betas))
    np.testing.assert_allclose(schedule.betas, reference, rtol=1e-9)
    assert schedule.alphas_cumprod[-1] == 0 < schedule.alphas_cumprod[-2]
    assert schedule.alphas_cumprod[0] == pytest.approx(NoiseSchedule.from_dict(SD).alphas_cumprod[0], rel=1e-12)
    noise = jnp.ones((1, 2, 2, 4))
    np.testing.assert_array_equal(schedule.add_noise(7 * noise, noise, jnp.array([999])), noise)
    np.testing.assert_array_equal(schedule.target(7 * noise, noise, jnp.array([999])), -7 * noise)


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 15, 50])
@pytest.mark.parametrize("class_name", RESCALING)
def test_schedulers_that_rescale_walk_as_in_diffusers(class_name, steps):
    reference = getattr(diffusers, class_name).from_config(ZERO)
    solver = solver_from_config({**ZERO, "_class_name": class_name}, steps)
    assert np.asarray(solver.timesteps)[0] == 999
    reference.alphas_cumprod = torch.from_numpy(NoiseSchedule.from_dict(ZERO).alphas_cumprod)
    if hasattr(reference, "sigmas"):
        reference.alphas_cumprod[-1] = 2.0**-24
    extra = {"eta": 0.0} if class_name == "DDIMScheduler" else {}
    assert_same_trajectory(solver, reference, steps, precise=hasattr(reference, "sigmas"), **extra)


@pytest.mark.parametrize("steps", [1, 2, 4, 15, 50])
@pytest.mark.parametrize("name", ["euler", "euler_a"])
def test_euler_from_infinite_noise_is_the_formula_in_float64(name, steps):
    class_name = next(cls for cls, (own, _) in CLASSES.items() if own == name)
    scheduler = getattr(diffusers, class_name).from_config(ZERO)
    scheduler.set_timesteps(steps)
    solver = solver_from_config(ZERO, steps, name=name)
    rng = np.random.default_rng(0)
    preds, noises = (rng.standard_normal((n, *SHAPE), dtype=np.float32) for n in (steps, steps + 1))
    _, outputs = trajectory(solver, preds, noises)
    sigmas = np.append(1 / np.asarray(solver.input_scale, np.float64) ** 2 - 1, 0) ** 0.5
    assert sigmas[0] == pytest.approx(4096, rel=1e-6) and float(solver.init_noise_sigma) == pytest.approx(4096)
    np.testing.assert_allclose(sigmas[1:-1], scheduler.sigmas[1:-1], rtol=1e-4)
    x = noises[-1].astype(np.float64) * sigmas[0]
    for i in range(steps):
        now, then = sigmas[i : i + 2]
        eps = now / (now**2 + 1) * x + preds[i] / np.sqrt(now**2 + 1)
        up = then * np.sqrt(1 - (then / now) ** 2) if name == "euler_a" else 0.0
        x = x + (np.sqrt(then**2 - up**2) - now) * eps + up * noises[i]
        assert np.abs(outputs[i] - x).max() < 1e-5 * np.abs(x).max()


@pytest.mark.parametrize("steps", [1, 4, 30])
@pytest.mark.parametrize("name", list(NAMES))
def test_every_solver_is_finite_from_infinite_noise(name, steps):
    solver = solver_from_config(ZERO, steps, name=name)
    assert all(np.isfinite(leaf).all() for leaf in vars(solver).values())
    rows = len(solver.timesteps)
    rng = np.random.default_rng(0)
    preds, noises = (rng.standard_normal((n, *SHAPE), dtype=np.float32) for n in (rows, rows + 1))
    assert all(np.isfinite(x).all() for x in trajectory(solver, preds, noises))


def test_the_clean_estimate_and_the_log_probability_are_finite_without_signal():
    schedule = NoiseSchedule.from_dict(ZERO)
    r, u = clean_estimate(schedule, np.array([999]))
    assert (r[0], u[0]) == (0, -1), "the network says the negative of the image itself"
    solver = solver_from_config(ZERO, 10, name="ddim", eta=1.0)
    row = jax.tree.map(lambda column: column[0], solver)
    x, pred, z = np.random.default_rng(0).standard_normal((3, *SHAPE), dtype=np.float32)
    after, _ = step(x, pred, row, z)
    value, gradient = jax.value_and_grad(lambda pred: log_prob(after, x, pred, row).sum())(pred)
    assert np.isfinite(value) and np.isfinite(gradient).all() and gradient.any()
    expected = -np.square(z.astype(np.float64)).mean((1, 2, 3)) / 2 - np.log(2 * np.pi) / 2
    expected -= np.log(np.sqrt(1 - schedule.alphas_cumprod[899]))
    np.testing.assert_allclose(log_prob(after, x, pred, row), expected, rtol=1e-4)


def test_noise_that_is_predicted_without_signal_is_refused_where_it_would_be_divided_by_it():
    noise = ZERO | {"prediction_type": "epsilon"}
    for name in NAMES:
        if name in ("ddim", "ddpm", "lcm", "pndm", "tcd"):
            with pytest.raises(ValueError, match="rescale_betas_zero_snr=True with prediction_type='epsilon' is not"):
                solver_from_config(noise, 4, name=name)
        else:
            solver = solver_from_config(noise, 4, name=name)
            assert all(np.isfinite(leaf).all() for leaf in vars(solver).values())


def test_leading_spacing_begins_at_the_last_timestep_and_says_so():
    file = ZERO | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1}
    with pytest.warns(UserWarning, match="timestep_spacing='leading' is read as 'trailing'"):
        solver = solver_from_config(file, 4)
    assert np.asarray(solver.timesteps).tolist() == [999, 749, 499, 249]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = solver_from_config(file, 4, spacing="leading")
    assert np.asarray(asked.timesteps)[0] == 751


def test_a_schedule_of_one_timestep_cannot_be_rescaled():
    with pytest.raises(ValueError, match="rescale_betas_zero_snr=True over num_train_timesteps=1 is not supported"):
        dataclasses.replace(NoiseSchedule(), num_train_timesteps=1, rescale_betas_zero_snr=True)
