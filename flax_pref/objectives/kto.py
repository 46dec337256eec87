"""Diffusion-KTO: images that are desirable or not, each judged against the mean (arXiv:2404.04465)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.objectives.denoising import errors, noisy_images
from flax_pref.objectives.dpo import pair_metrics, reference_errors


def diffusion_kto(
    predict: Callable,
    batch: Mapping[str, Any],
    key: jax.Array,
    *,
    schedule: NoiseSchedule,
    beta: float,
    policy: str = "kto",
    reference: str = "base",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`1 - sigmoid(+-beta (g - Q))` per image, `g = -(L - L^ref)`, plus for winners; then the mean over images.

    Q is the mean of g over all images of the batch, but not below zero, and a constant. A batch that is divided over
    devices has one Q; steps that accumulate gradients have one for each part.

    Pairs are two images that need not be compared, and it does not matter which loser goes with which winner. The
    authors' code draws timestep and noise for each image; here those of a pair share them, as in the other objectives.

    Args:
      predict: see `dpo.diffusion_dpo`.
      batch: see `dpo.diffusion_dpo`.
      key: draws timesteps and noise.
      schedule: of the noise.
      beta: of g, without a factor 1/2, as in the authors' code (1000 there).
      policy: name of the network that is trained.
      reference: name of the network that it is compared with.

    Returns:
      loss (one half before any training), and the metrics of `dpo.diffusion_dpo`, and `baseline`, Q.

    Raises:
      ValueError: see `denoising.noisy_images`.
    """
    noisy = noisy_images(batch, key, schedule)
    changes = errors(predict, (policy, policy), noisy) - reference_errors(predict, reference, noisy)
    baseline = jax.lax.stop_gradient(jnp.maximum(-changes.mean(), 0))
    winner, loser = changes
    desirable = jax.nn.sigmoid(-beta * (-winner - baseline))
    undesirable = jax.nn.sigmoid(beta * (-loser - baseline))
    loss = (desirable.mean() + undesirable.mean()) / 2
    return loss, {**pair_metrics(loss, loser - winner, winner, loser), "baseline": baseline}
