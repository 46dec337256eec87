"""Denoising: how diffusion models are trained (arXiv:2006.11239, equation 14), and positive and negative modules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    """`L = mean over H, W, C of (eps_theta - eps)^2`, float32 `[...]` of `[..., H, W, C]`."""
    return jnp.square(noise_pred.astype(jnp.float32) - noise).mean(axis=(-3, -2, -1))


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
      predict: `(networks, latents [B, 1, H, W, C], timesteps [B], text) -> noise_pred [B, 1, H, W, C]`.
      batch: `latents [B, H, W, C]`, scaled, and `text`, a pytree of `[B, ...]` arrays that `predict` takes.
      key: draws timesteps and noise.
      schedule: of the noise.
      network: that is trained.
      largest_weight: of a timestep, see `velocity_weights`.

    Returns:
      loss, and the metrics `loss`.
    """
    timesteps, noise = draw_noise(schedule, batch["latents"], key)
    noisy, text = rows([schedule.add_noise(batch["latents"], noise, timesteps)], batch["text"])
    noise_pred = predict((network,), noisy, timesteps, text)[:, 0]
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
      predict: `(networks, latents [B, 2, H, W, C], timesteps [B], text) -> noise_pred [B, 2, H, W, C]`, where
        networks names the network of each of the two rows.
      batch: `winner` and `loser`, scaled latents `[B, H, W, C]`, and `text`, a pytree of `[B, ...]` arrays.
      key: draws timesteps and noise.
      schedule: of the noise.
      positive: name of the module that learns from winners.
      negative: name of the module that learns from losers.

    Returns:
      loss, and the metrics `loss`, `winner` and `loser`, the error of each module.
    """
    timesteps, noise = draw_noise(schedule, batch["winner"], key)
    noisy, text = rows(
        [schedule.add_noise(batch[image], noise, timesteps) for image in ("winner", "loser")], batch["text"]
    )
    noise_pred = predict((positive, negative), noisy, timesteps, text)
    winner, loser = jnp.moveaxis(denoising_error(noise_pred, noise[:, None]), 1, 0)
    loss = winner.mean() + loser.mean()
    return loss, {"loss": loss, "winner": winner.mean(), "loser": loser.mean()}


def rows(latents: Sequence[jax.Array], text: Any) -> tuple[jax.Array, Any]:
    """Latents of R rows for each image, `[B, R, H, W, C]` of R times `[B, H, W, C]`, and the same text for each."""
    return jnp.stack(latents, axis=1), jax.tree.map(lambda x: jnp.stack([x] * len(latents), axis=1), text)
