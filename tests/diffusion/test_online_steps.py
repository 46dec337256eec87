"""What online training asks of sampler and solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_pref.diffusion.guidance import cfg, tabulate
from flax_pref.diffusion.sampler import image_keys, sample_trajectory
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.solvers import clean_estimate, log_prob
from flax_pref.diffusion.timestep_solvers import ddim

SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_trajectories_can_begin_at_one_point_and_part_there():
    solver = ddim(SCHEDULE, 3, eta=1.0)
    start = np.ones((2, 2, 2, 1), np.float32)
    latents, _ = sample_trajectory(
        lambda networks, latents, timesteps, text: 0.1 * latents,
        tabulate(cfg(2.0), 3, 2),
        solver,
        image_keys(0, [0, 1]),
        np.zeros((2, 1), np.float32),
        np.zeros(1, np.float32),
        (2, 2, 1),
        start=start,
    )
    np.testing.assert_array_equal(latents[0], start)
    assert np.abs(latents[1, 0] - latents[1, 1]).min() > 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_clean_latents_are_found_again_from_the_true_noise(prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    timesteps = np.array([0, 500, 999])
    clean, noise = np.random.default_rng(0).standard_normal((2, 3, 4))
    abar = schedule.alphas_cumprod[timesteps][:, None]
    noisy = np.sqrt(abar) * clean + np.sqrt(1 - abar) * noise
    predicted = noise if prediction_type == "epsilon" else np.sqrt(abar) * noise - np.sqrt(1 - abar) * clean
    r, u = clean_estimate(schedule, timesteps.astype(np.float32))
    np.testing.assert_allclose(r[:, None] * noisy + u[:, None] * predicted, clean, rtol=1e-9, atol=1e-9)


def test_log_probabilities_are_as_exact_as_what_they_are_made_of():
    row = jax.tree.map(lambda x: x[1], ddim(SCHEDULE, 3, eta=1.0))
    latents = np.random.default_rng(0).standard_normal((3, 1, 2, 2, 1))
    assert log_prob(*jnp.asarray(latents, jnp.bfloat16), row).dtype == jnp.float32
    with jax.enable_x64():
        row = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), row)
        assert log_prob(*jnp.asarray(latents), row).dtype == jnp.float64
