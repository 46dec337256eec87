"""Diffusion-DPO (arXiv:2311.12908, equation 14)."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.objectives.denoising import denoising_error, draw_noise, pair_rows


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
      predict: `(networks, latents [2 B, H, W, C], timesteps [2 B], text) -> noise_pred [2 B, H, W, C]`, where
        networks names the network of each group of B rows.
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
    latents, timesteps, noise, text = pair_rows(batch, timesteps, noise)
    noisy = schedule.add_noise(latents, noise, timesteps)

    def errors(network):
        return jnp.split(denoising_error(predict((network, network), noisy, timesteps, text), noise), 2)

    winner, loser = errors(policy)
    # A call of its own, so that no gradient is computed for it.
    winner_reference, loser_reference = jax.lax.stop_gradient(errors(reference))
    winner, loser = winner - winner_reference, loser - loser_reference
    logits = -beta / 2 * (winner - loser)
    loss = -jax.nn.log_sigmoid(logits).mean()
    accuracy = jnp.mean((logits > 0) + 0.5 * (logits == 0))
    return loss, {"loss": loss, "accuracy": accuracy, "winner": winner.mean(), "loser": loser.mean()}
