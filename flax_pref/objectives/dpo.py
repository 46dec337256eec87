"""Diffusion-DPO (arXiv:2311.12908, equation 14)."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.objectives.denoising import denoising_error, draw_noise, rows


def diffusion_dpo(
    predict: Callable,
    batch: Mapping[str, jax.Array],
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
      batch: `winner` and `loser`, scaled latents `[B, H, W, C]`, and `text`, a pytree of `[B, ...]` arrays.
      key: draws timesteps and noise.
      schedule: of the noise.
      beta: strength of the pull to the reference, as in the authors' code (5000 there), which has the factor 1/2.
      policy: name of the network that is trained.
      reference: name of the network that it is compared with.

    Returns:
      loss, and the metrics `loss`, `accuracy` (share of pairs that the policy ranks right against the reference),
      `winner` and `loser` (errors minus those of the reference; a winner's error that rises is the known failure).
    """
    timesteps, noise = draw_noise(schedule, batch["winner"], key)
    noisy, text = rows(
        [schedule.add_noise(batch[image], noise, timesteps) for image in ("winner", "loser")], batch["text"]
    )

    def errors(network):
        noise_pred = predict((network, network), noisy, timesteps, text)
        return jnp.moveaxis(denoising_error(noise_pred, noise[:, None]), 1, 0)

    winner, loser = errors(policy)
    # A call of its own, so that no gradient is computed for it.
    winner_reference, loser_reference = jax.lax.stop_gradient(errors(reference))
    winner, loser = winner - winner_reference, loser - loser_reference
    logits = -beta / 2 * (winner - loser)
    loss = -jax.nn.log_sigmoid(logits).mean()
    accuracy = jnp.mean((logits > 0) + 0.5 * (logits == 0))
    return loss, {"loss": loss, "accuracy": accuracy, "winner": winner.mean(), "loser": loser.mean()}
