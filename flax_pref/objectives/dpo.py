"""Diffusion-DPO (arXiv:2311.12908, equation 14), and what objectives with a reference have in common.

The reference is a network of the bank: with adapters it is the backbone without them, no second copy of the weights.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.objectives.denoising import NoisyImages, errors, noisy_images


def diffusion_dpo(
    predict: Callable,
    batch: Mapping[str, Any],
    key: jax.Array,
    *,
    schedule: NoiseSchedule,
    beta: float,
    policy: str = "dpo",
    reference: str = "base",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`-log sigmoid(-beta / 2 ((L_w - L_w^ref) - (L_l - L_l^ref)))` per pair, then the mean over pairs.

    L is the denoising error; winner and loser share timestep and noise, policy and reference too.

    Args:
      predict: `(networks, latents [B, 2, H, W, C], timesteps [B], text) -> noise_pred [B, 2, H, W, C]`, where
        networks names the network of each of the two rows.
      batch: `winner` and `loser`, scaled latents `[B, H, W, C]`; `text`, a pytree of `[B, ...]` arrays that
        `predict` takes; where `text_embeds` is among them, as in SDXL, also `time_ids [B, 2, 6]`, the sizes of winner
        and loser.
      key: draws timesteps and noise.
      schedule: of the noise.
      beta: strength of the pull to the reference, as in the authors' code (5000 there), which has the factor 1/2; the
        paper has 2000 for SD1.5.
      policy: name of the network that is trained.
      reference: name of the network that it is compared with.

    Returns:
      loss, and the metrics `loss`, `accuracy` (share of pairs that the policy ranks right against the reference),
      `winner` and `loser` (errors minus those of the reference; a winner's error that rises is the known failure).

    Raises:
      ValueError: see `denoising.noisy_images`.
    """
    noisy = noisy_images(batch, key, schedule)
    winner, loser = errors(predict, (policy, policy), noisy) - reference_errors(predict, reference, noisy)
    logits = -beta / 2 * (winner - loser)
    loss = logistic_loss(logits)
    return loss, pair_metrics(loss, logits, winner, loser)


def reference_errors(predict: Callable, reference: str, noisy: NoisyImages) -> jax.Array:
    """L of the reference for every image, `[R, B]`, a constant.

    It is a prediction of its own: as rows of the policy's, the reference would take part in computing gradients.
    """
    return jax.lax.stop_gradient(errors(predict, (reference,) * noisy.latents.shape[1], noisy))


def logistic_loss(logits: jax.Array) -> jax.Array:
    """`-log sigmoid` of each pair's logit `[B]`, then the mean over pairs: in this order (Jensen's inequality)."""
    return -jax.nn.log_sigmoid(logits).mean()


def pair_metrics(loss: jax.Array, logits: jax.Array, winner: jax.Array, loser: jax.Array) -> dict[str, jax.Array]:
    """The metrics that objectives of pairs have in common, scalars.

    Args:
      loss: of the batch.
      logits: `[B]`, above zero where a pair is ranked as it should be; those that are zero, as before any training,
        count one half in `accuracy`.
      winner: errors `[B]`, minus those of the reference where there is one.
      loser: of losers likewise.
    """
    accuracy = jnp.mean((logits > 0) + 0.5 * (logits == 0))
    return {"loss": loss, "accuracy": accuracy, "winner": winner.mean(), "loser": loser.mean()}
