"""Losses that the base of the demo world is trained with: denoising, and that of the autoencoder."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.diffusion.sampler import Predict
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.methods.errors import errors, noisy_images


def velocity_weights(schedule: NoiseSchedule, largest: float) -> np.ndarray:
    """Weights of the timesteps, float32 `[T]` of mean one: `min(1 / abar_t, largest)`.

    `L / abar_t` is the error of the velocity (arXiv:2202.00512, appendix D). In the error of the noise, timesteps of
    high noise hardly count, and there it is decided what goes where in an image; `largest` bounds the variance of the
    gradients, and 1 is the error of the noise itself.
    """
    weights = np.minimum(1 / schedule.alphas_cumprod, largest)
    return (weights / weights.mean()).astype(np.float32)


def denoising(
    predict: Predict,
    batch: Mapping[str, Any],
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
    noisy = noisy_images(batch, key, schedule, ("latents",))
    (error,) = errors(predict, (network,), noisy)
    loss = (jnp.asarray(velocity_weights(schedule, largest_weight))[noisy.timesteps] * error).mean()
    return loss, {"loss": loss}


def autoencoding(
    encode: Callable, decode: Callable, batch: Mapping[str, jax.Array], key: jax.Array, *, kl_weight: float = 1e-4
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error of the pixels and of their differences, and a weak pull of the latents to N(0, 1).

    The objective of arXiv:2112.10752, equation 25, without the adversarial and perceptual terms.

    The differences weigh edges. Absolute errors, usual for photographs, are a poor choice for small objects on flat
    grounds: their median is the ground, and the network takes thousands of steps to find colours.

    Args:
        encode: images -> (mean, logvar) of the latents.
        decode: latents -> images.
        batch: `images [B, H, W, 3]` in [-1, 1].
        key: draws the latents from their posterior.
        kl_weight: of the divergence per latent number, against the squared error per pixel.

    Returns:
        loss, and its terms.
    """
    images = batch["images"]
    mean, logvar = encode(images)
    latents = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
    error = decode(latents) - images
    reconstruction = jnp.square(error).mean()
    outlines = jnp.square(jnp.diff(error, axis=1)).mean() + jnp.square(jnp.diff(error, axis=2)).mean()
    kl = jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar) / 2
    loss = reconstruction + outlines + kl_weight * kl
    return loss, {"loss": loss, "reconstruction": reconstruction, "kl": kl}
