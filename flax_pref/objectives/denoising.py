"""Denoising: how diffusion models are trained (arXiv:2006.11239, equation 14), and positive and negative modules."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.diffusion.schedule import NoiseSchedule


def draw_noise(schedule: NoiseSchedule, latents: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`t ~ U{0 .. T-1}` and `eps ~ N(0, 1)` for each row of `latents [B, H, W, C]`: `([B], [B, H, W, C])`."""
    timestep_key, noise_key = jax.random.split(key)
    timesteps = jax.random.randint(timestep_key, latents.shape[:1], 0, schedule.num_train_timesteps)
    return timesteps, jax.random.normal(noise_key, latents.shape)


def denoising_error(noise_pred: jax.Array, noise: jax.Array) -> jax.Array:
    """`L = mean over H, W, C of (eps_theta - eps)^2`, float32 `[B]`."""
    return jnp.square(noise_pred.astype(jnp.float32) - noise).mean(axis=(1, 2, 3))


def velocity_weights(schedule: NoiseSchedule, largest: float) -> np.ndarray:
    """Weights of the timesteps, float32 `[T]` of mean one: `min(1 / abar_t, largest)`.

    `L / abar_t` is the error of the velocity (arXiv:2202.00512, appendix D). In the error of the noise, timesteps of
    high noise hardly count, and there it is decided what goes where in an image; `largest` bounds the variance of the
    gradients, and 1 is the error of the noise itself.
    """
    weights = np.minimum(1 / schedule.alphas_cumprod, largest)
    return (weights / weights.mean()).astype(np.float32)


def denoising(
    predict: Callable,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    schedule: NoiseSchedule,
    network: str = "base",
    largest_weight: float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean of `L` over a batch of images.

    Args:
      predict: `(networks, latents [B, H, W, C], timesteps [B], text) -> noise_pred [B, H, W, C]`.
      batch: `latents [B, H, W, C]`, scaled, and `text`, a pytree of `[B, ...]` arrays that `predict` takes.
      key: draws timesteps and noise.
      schedule: of the noise.
      network: that is trained.
      largest_weight: of a timestep, see `velocity_weights`.

    Returns:
      loss, and the metrics `loss`.
    """
    timesteps, noise = draw_noise(schedule, batch["latents"], key)
    noise_pred = predict((network,), schedule.add_noise(batch["latents"], noise, timesteps), timesteps, batch["text"])
    weights = jnp.asarray(velocity_weights(schedule, largest_weight))[timesteps]
    loss = (weights * denoising_error(noise_pred, noise)).mean()
    return loss, {"loss": loss}


def positive_negative(
    predict: Callable,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    schedule: NoiseSchedule,
    positive: str = "pos",
    negative: str = "neg",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The positive module denoises winners, the negative one losers (arXiv:2602.18799); no reference, no coupling.

    Both modules run in one batched prediction. The loss is the sum of theirs, so that each gets the gradient that it
    would get alone; both images of a pair share timestep and noise.

    Args:
      predict: `(networks, latents [2 B, H, W, C], timesteps [2 B], text) -> noise_pred [2 B, H, W, C]`, where
        networks names the network of each group of B rows.
      batch: `winner` and `loser`, scaled latents `[B, H, W, C]`, and `text`, a pytree of `[B, ...]` arrays.
      key: draws timesteps and noise.
      schedule: of the noise.
      positive: name of the module that learns from winners.
      negative: name of the module that learns from losers.

    Returns:
      loss, and the metrics `loss`, `winner` and `loser`, the error of each module.
    """
    timesteps, noise = draw_noise(schedule, batch["winner"], key)
    latents, timesteps, noise, text = pair_rows(batch, timesteps, noise)
    noise_pred = predict((positive, negative), schedule.add_noise(latents, noise, timesteps), timesteps, text)
    winner, loser = jnp.split(denoising_error(noise_pred, noise), 2)
    loss = winner.mean() + loser.mean()
    return loss, {"loss": loss, "winner": winner.mean(), "loser": loser.mean()}


def pair_rows(batch: Mapping[str, jax.Array], timesteps: jax.Array, noise: jax.Array):
    """Winners, then losers, as one batch: latents, timesteps, noise and text of `2 B` rows."""
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), (timesteps, noise, batch["text"]))
    return jnp.concatenate([batch["winner"], batch["loser"]]), *twice
