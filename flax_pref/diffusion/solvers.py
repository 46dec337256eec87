"""Solvers of the sampling equation, as tables.

Every step of DDIM (arXiv:2010.02502), of Euler's method (arXiv:2206.00364), of DPM-Solver++ (arXiv:2211.01095) and of
their kin is linear in the latents x and in the last few estimates m:

    m_i = r x_i + u noise_pred_i
    x_{i+1} = a x_i + b_0 m_i + b_1 m_{i-1} + ... + c z,    z ~ N(0, 1)

so a solver is the table of r, u, a, b and c over its steps. What the network predicts, noise or velocity, is folded in.
`timestep_solvers`, `sigma_solvers` and `exponential_solvers` make the tables, `scheduler_configs` chooses one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.diffusion.schedule import NoiseSchedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver:
    """A table with one row per step, float32 `[S]` where nothing else is said, in the order of sampling.

    All its arrays have the steps as leading axis, so `lax.scan` runs over it as it is and sees one row, a Solver of
    scalars, at a time. Solvers of one kind and number of steps share what is compiled for them.

    Attributes:
        timesteps: what the network is told; not always whole numbers, see `diffusion.noise_levels`.
        input_scale: the network sees `input_scale * latents`.
        estimate_from_latents: r, of the latents in the estimate.
        estimate_from_pred: u, of the network's prediction in the estimate.
        latents_coef: a, of the latents.
        estimate_coefs: b, `[S, K]`: of the step's own estimate and of the K - 1 before it, latest first.
        fresh_noise_coef: c, of newly drawn noise.
        clean_from_latents: of the latents in what a prediction says of the clean ones, whatever m is.
        clean_from_pred: of the network's prediction in that.
        init_noise_sigma: standard deviation of the latents at the start.
        stochastic: whether any step draws noise; static, so that deterministic solvers draw none.
    """

    timesteps: jax.Array
    input_scale: jax.Array
    estimate_from_latents: jax.Array
    estimate_from_pred: jax.Array
    latents_coef: jax.Array
    estimate_coefs: jax.Array
    fresh_noise_coef: jax.Array
    clean_from_latents: jax.Array
    clean_from_pred: jax.Array
    init_noise_sigma: float = dataclasses.field(metadata={"static": True})
    stochastic: bool = dataclasses.field(metadata={"static": True})


def no_history(solver: Solver, latents: jax.Array) -> tuple[jax.Array, ...]:
    """What `step` takes as history at the first step: K - 1 arrays like latents, none where each step stands alone."""
    return (jnp.zeros_like(latents),) * (solver.estimate_coefs.shape[-1] - 1)


def step(
    latents: jax.Array,
    noise_pred: jax.Array,
    row: Solver,
    noise: jax.Array | None = None,
    history: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """One step of sampling: `m = r x + u noise_pred`, then `x' = a x + sum_k b_k m_k + c z`.

    Args:
        latents: x, `[B, H, W, C]`.
        noise_pred: `[B, H, W, C]`, the network's prediction as it is, be it noise or velocity.
        row: one row of a solver; or one of each image, that is, with a leading axis B.
        noise: z, `[B, H, W, C]`; None for the mean of the step, all there is to a solver that is not stochastic.
        history: the estimates of the K - 1 steps before, latest first, each `[B, H, W, C]`; see `no_history`.

    Returns:
        x', `[B, H, W, C]`, and the history for the next step.

    Raises:
        ValueError: the history is not as long as the solver needs it.
    """
    num_estimates = row.estimate_coefs.shape[-1]
    if len(history) != num_estimates - 1:
        raise ValueError(
            f"step: this solver needs the estimates of the last {num_estimates - 1} steps, got {len(history)}; "
            "start with no_history and pass on what step returns"
        )
    estimate = _per_image(row.estimate_from_latents) * latents + _per_image(row.estimate_from_pred) * noise_pred
    estimates = (estimate, *history)
    latents = _per_image(row.latents_coef) * latents
    for k, estimate in enumerate(estimates):
        latents = latents + _per_image(row.estimate_coefs[..., k]) * estimate
    if noise is not None:
        latents = latents + _per_image(row.fresh_noise_coef) * noise
    return latents, estimates[:-1]


def log_prob(next_latents: jax.Array, latents: jax.Array, noise_pred: jax.Array, row: Solver) -> jax.Array:
    """Log-probability that a stochastic step leads from latents to next_latents.

    The step draws from `N(mean, c^2)`; the log-density is averaged, not summed, over the dimensions of an image, as in
    the released code of DDPO (arXiv:2305.13301) and D3PO (arXiv:2311.13231):

        -(x' - mean)^2 / (2 c^2) - log c - log(2 pi) / 2

    A step that draws no noise (c = 0: the last one where it ends without noise) has one outcome and no density. It
    counts as 0 with gradient 0, so that it neither adds to sums nor moves ratios of probabilities.

    Args:
        next_latents: x', `[B, H, W, C]`.
        latents: x, `[B, H, W, C]`.
        noise_pred: `[B, H, W, C]`, the network's prediction as it is, be it noise or velocity.
        row: one row of a stochastic solver; or one of each image, that is, with a leading axis B.

    Returns:
        `[B]`, in no less than float32.

    Raises:
        ValueError: the solver is not stochastic, or its steps depend on those before them.
    """
    if not row.stochastic:
        raise ValueError("log_prob: the solver draws no noise, so its steps have no density; take ddim with eta > 0")
    if row.estimate_coefs.shape[-1] > 1:
        raise ValueError(
            "log_prob: steps of this solver depend on those before them and have no density of their own; take ddim "
            "with eta > 0"
        )
    dtype = jnp.promote_types(noise_pred.dtype, jnp.float32)
    mean, _ = step(latents.astype(dtype), noise_pred.astype(dtype), row)
    draws = row.fresh_noise_coef > 0
    # A harmless deviation where none is drawn: what jnp.where leaves out must still have finite gradients.
    deviation = jnp.where(draws, row.fresh_noise_coef, 1)
    distance = jnp.square((next_latents.astype(dtype) - mean) / _per_image(deviation)).mean((1, 2, 3))
    return jnp.where(draws, -distance / 2 - jnp.log(deviation) - np.log(2 * np.pi) / 2, 0)


def clean_estimate(schedule: NoiseSchedule, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r and u, `[S]` each, of the estimate of the clean latents `x_0 = r x + u noise_pred` at trained timesteps `[S]`.

    The latents x are those of DDIM and DPM-Solver++, of variance one.
    """
    return schedule.clean_coefs(schedule.alphas_cumprod[np.asarray(timesteps, int)])


def _per_image(coef: jax.Array) -> jax.Array:
    """A coefficient, scalar or `[B]`, such that it multiplies `[B, H, W, C]`."""
    return coef[..., None, None, None]
