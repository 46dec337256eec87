"""Trajectories of our solvers and of diffusers' schedulers, from the same predictions and the same noise."""

import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from flax_pref.diffusion.solvers import Solver, no_history, step

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SHAPE = (2, 4, 3, 2)


@jax.jit
def trajectory(solver: Solver, noise_preds: np.ndarray, noises: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the network sees and what comes out of every step, for given predictions `[S, ...]`."""

    def advance(carry, table):
        latents, history = carry
        row, noise_pred, noise = table
        after, history = step(latents, noise_pred, row, noise if solver.stochastic else None, history)
        return (after, history), (row.input_scale * latents, after)

    start = jnp.asarray(solver.init_noise_sigma * noises[-1])
    return jax.lax.scan(advance, (start, no_history(solver, start)), (solver, noise_preds, noises[:-1]))[1]


def reference_trajectory(scheduler, noise_preds: np.ndarray, noises: np.ndarray, **extra):
    """The same of a scheduler of diffusers, which draws `noises`; in their precision."""
    latents = torch.from_numpy(noises[-1]) * scheduler.init_noise_sigma
    inputs, outputs = [], []
    module = sys.modules[type(scheduler).__module__]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # otherwise a timestep that is visited twice is not found
    for i, t in enumerate(scheduler.timesteps):
        inputs.append(scheduler.scale_model_input(latents, t))
        with mock.patch.object(module, "randn_tensor", lambda *_, i=i, **__: torch.from_numpy(noises[i]), create=True):
            latents = scheduler.step(torch.from_numpy(noise_preds[i]), t, latents, **extra).prev_sample
        outputs.append(latents)
    return torch.stack(inputs).numpy(), torch.stack(outputs).numpy()


def assert_same_trajectory(
    solver: Solver, scheduler, steps: int | None, timestep_atol: float = 0.0, *, precise: bool = False, **extra
):
    """Every step of both within 1e-5 of its largest latent.

    Args:
        solver: ours.
        scheduler: of diffusers.
        steps: their number; None where the scheduler has its timesteps.
        timestep_atol: of what the network is told.
        precise: whether the scheduler computes in float64, from its sigmas on; some of them lose more than 1e-5 in
            float32, where they take differences of near equals.
        extra: arguments of the scheduler's step.
    """
    if steps is not None:
        scheduler.set_timesteps(steps)
    rows = len(scheduler.timesteps)
    np.testing.assert_allclose(solver.timesteps, scheduler.timesteps.numpy(), rtol=1e-6, atol=timestep_atol)
    rng = np.random.default_rng(rows)
    noise_preds = rng.standard_normal((rows, *SHAPE), dtype=np.float32)
    noises = rng.standard_normal((rows + 1, *SHAPE), dtype=np.float32)
    given = noise_preds, noises
    if precise:
        scheduler.sigmas = scheduler.sigmas.double()
        given = noise_preds.astype(np.float64), noises.astype(np.float64)
    expected = reference_trajectory(scheduler, *given, **extra)
    for ours, theirs in zip(trajectory(solver, noise_preds, noises), expected, strict=True):
        # Relative to each step's largest latent: errors do not shrink where latents happen to be close to zero.
        size = np.abs(theirs).max(axis=(1, 2, 3, 4))
        error = np.abs(ours - theirs).max(axis=(1, 2, 3, 4)) / size
        assert error.max() < 1e-5
