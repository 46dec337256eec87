"""MaPO: preference optimization with a margin and without a reference (arXiv:2406.06424)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.objectives.denoising import errors, noisy_images
from flax_pref.objectives.dpo import logistic_loss, pair_metrics


def mapo(
    predict: Callable,
    batch: Mapping[str, Any],
    key: jax.Array,
    *,
    schedule: NoiseSchedule,
    beta: float,
    snr: float = 0.5,
    policy: str = "mapo",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`L_w - beta log sigmoid(T (f(L_w) - f(L_l)))` per pair, `f(L) = h L / (exp(h L) - 1)`; then the mean over pairs.

    L is the denoising error, T the number of timesteps; winner and loser share timestep and noise. f falls from one at
    no error to zero.

    Args:
      predict: see `dpo.diffusion_dpo`.
      batch: see `dpo.diffusion_dpo`.
      key: draws timesteps and noise.
      schedule: of the noise.
      beta: weight of the margin (0.1 in the authors' code).
      snr: h, which the authors' code calls snr_value.
      policy: name of the network that is trained.

    Returns:
      loss, and the metrics `loss`, `accuracy` (share of pairs whose winner the policy predicts better than the loser),
      `winner` and `loser`, the errors.

    Raises:
      ValueError: see `denoising.noisy_images`.
    """
    winner, loser = errors(predict, (policy, policy), noisy_images(batch, key, schedule))
    logits = schedule.num_train_timesteps * (likelihood(snr * winner) - likelihood(snr * loser))
    loss = winner.mean() + beta * logistic_loss(logits)
    return loss, pair_metrics(loss, logits, winner, loser)


def likelihood(x: jax.Array) -> jax.Array:
    """`x / (exp(x) - 1)` of positive numbers, without the overflow of the exponential and without cancellation."""
    return x * jnp.exp(-x) / -jnp.expm1(-x)
