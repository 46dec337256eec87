"""What the tables of solvers are made with: columns in float64, and rows that start where an earlier one did."""

import jax.numpy as jnp
import numpy as np

from flax_pref.diffusion.solvers import Solver

Coefs = tuple[np.ndarray, np.ndarray]
"""Of latents and prediction."""


def solver_of(
    *,
    timesteps: np.ndarray,
    estimate: Coefs,
    clean: Coefs,
    latents_coef: np.ndarray,
    estimate_coefs: np.ndarray,
    input_scale: np.ndarray | None = None,
    fresh_noise_coef: np.ndarray | None = None,
    init_noise_sigma: float = 1.0,
    stochastic: bool = False,
) -> Solver:
    """The table of float64 columns, rounded here and nowhere else."""
    columns = {
        "timesteps": timesteps,
        "input_scale": np.ones(len(timesteps)) if input_scale is None else input_scale,
        "estimate_from_latents": estimate[0],
        "estimate_from_pred": estimate[1],
        "latents_coef": latents_coef,
        "estimate_coefs": estimate_coefs,
        "fresh_noise_coef": np.zeros(len(timesteps)) if fresh_noise_coef is None else fresh_noise_coef,
        "clean_from_latents": clean[0],
        "clean_from_pred": clean[1],
    }
    columns = {name: jnp.asarray(column, jnp.float32) for name, column in columns.items()}
    return Solver(**columns, init_noise_sigma=init_noise_sigma, stochastic=stochastic)


def from_latents(latents_coef: np.ndarray, coefs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two rows that start at the same latents X, the second one in terms of what the first one left.

    The first row leaves `x' = A X + sum_k B_k m_k`, so `X = (x' - sum_k B_k m_k) / A`; its estimates are one further in
    the past for the second row.
    """
    ratio = latents_coef[1] / latents_coef[0]
    second = coefs[1].copy()
    second[1:] -= ratio * coefs[0, :-1]
    return np.array([latents_coef[0], ratio]), np.stack([coefs[0], second])
