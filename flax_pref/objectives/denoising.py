"""Denoising: how diffusion models are trained (arXiv:2006.11239, equation 14), and positive and negative modules."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.diffusion.schedule import NoiseSchedule

PAIR = ("winner", "loser")


# ----------------------------------------------------------------------------------------------------------------------
# Errors


class NoisyImages(NamedTuple):
    """R rows for each entry of a batch, each an image of it, with the same noise at the same timestep.

    Attributes:
      latents: `[B, R, H, W, C]`.
      timesteps: `[B]`.
      text: what else the networks are told, a pytree of `[B, R, ...]` arrays.
      noise: `[B, 1, H, W, C]`, what the networks are to predict.
    """

    latents: jax.Array
    timesteps: jax.Array
    text: Any
    noise: jax.Array


def noisy_images(
    batch: Mapping[str, Any], key: jax.Array, schedule: NoiseSchedule, images: tuple[str, ...] = PAIR
) -> NoisyImages:
    """What networks predict from; the same key gives the same noise and timesteps, whatever the images.

    Args:
      batch: what `images` name, scaled latents `[B, H, W, C]`, and `text`, see `positive_negative`.
      key: draws timesteps and noise.
      schedule: of the noise.
      images: names of the image of each of the R rows.

    Raises:
      ValueError: the networks do not predict noise.
    """
    if schedule.prediction_type != "epsilon":
        raise ValueError(
            f"objectives: prediction_type is {schedule.prediction_type!r}, expected 'epsilon': their errors are those "
            "of predicted noise; take a base that predicts noise"
        )
    timesteps, noise = draw_noise(schedule, batch[images[0]], key)
    latents = jnp.stack([schedule.add_noise(batch[image], noise, timesteps) for image in images], axis=1)
    return NoisyImages(latents, timesteps, text_of_images(batch, images), noise[:, None])


def text_of_images(batch: Mapping[str, Any], images: tuple[str, ...]) -> Any:
    """The text of a batch for R rows, `[B, R, ...]` each: the same in all, but in SDXL with the size of the image."""
    text = jax.tree.map(lambda x: jnp.stack([x] * len(images), axis=1), batch["text"])
    if isinstance(text, Mapping) and "text_embeds" in text and "time_ids" not in text:
        return {**text, "time_ids": jnp.stack([batch["time_ids"][:, PAIR.index(image)] for image in images], axis=1)}
    return text


def draw_noise(schedule: NoiseSchedule, latents: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`t ~ U{0 .. T-1}` and `eps ~ N(0, 1)` for each row of `latents [B, H, W, C]`: `([B], [B, H, W, C])`."""
    timestep_key, noise_key = jax.random.split(key)
    timesteps = jax.random.randint(timestep_key, latents.shape[:1], 0, schedule.num_train_timesteps)
    return timesteps, jax.random.normal(noise_key, latents.shape)


def errors(predict: Callable, networks: tuple[str, ...], noisy: NoisyImages) -> jax.Array:
    """L of the network of each row, `[R, B]`, so that rows can be unpacked; one batched prediction."""
    noise_pred = predict(networks, noisy.latents, noisy.timesteps, noisy.text)
    return denoising_error(noise_pred, noisy.noise).T


def denoising_error(noise_pred: jax.Array, noise: jax.Array) -> jax.Array:
    """`L = mean over H, W, C of (eps_theta - eps)^2`, `[...]` of `[..., H, W, C]`, in no less than float32."""
    return jnp.square(residual(noise_pred, noise)).mean(axis=(-3, -2, -1))


def residual(noise_pred: jax.Array, noise: jax.Array) -> jax.Array:
    """`eps_theta - eps` in no less than float32; the gradient of L with respect to `eps_theta` is a multiple of it."""
    return noise_pred.astype(jnp.promote_types(noise_pred.dtype, jnp.float32)) - noise


# ----------------------------------------------------------------------------------------------------------------------
# Objectives


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

    Raises:
      ValueError: see `noisy_images`.
    """
    noisy = noisy_images(batch, key, schedule, ("latents",))
    (error,) = errors(predict, (network,), noisy)
    loss = (jnp.asarray(velocity_weights(schedule, largest_weight))[noisy.timesteps] * error).mean()
    return loss, {"loss": loss}


def positive_negative(
    predict: Callable,
    batch: Mapping[str, Any],
    key: jax.Array,
    *,
    schedule: NoiseSchedule,
    positive: str | None = "pos",
    negative: str | None = "neg",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The positive module denoises winners, the negative one losers (arXiv:2602.18799); no reference, no coupling.

    Both modules run in one batched prediction. The loss is the sum of theirs, so that each gets the gradient that it
    would get alone; both images of a pair share timestep and noise.

    Args:
      predict: `(networks, latents [B, R, H, W, C], timesteps [B], text) -> noise_pred [B, R, H, W, C]`, where
        networks names the network of each of the R rows: two, or one where a module is trained alone.
      batch: `winner` and `loser`, scaled latents `[B, H, W, C]`; `text`, a pytree of `[B, ...]` arrays that
        `predict` takes; where `text_embeds` is among them, as in SDXL, also `time_ids [B, 2, 6]`, the sizes of winner
        and loser.
      key: draws timesteps and noise.
      schedule: of the noise.
      positive: name of the module that learns from winners; None: the negative one is trained alone.
      negative: name of the module that learns from losers; None: the positive one is trained alone.

    Returns:
      loss, and the metrics `loss`, `winner` and `loser`, the error of each module that is trained.

    Raises:
      ValueError: there is no module to train, or see `noisy_images`.
    """
    modules = {image: name for image, name in zip(PAIR, (positive, negative), strict=True) if name is not None}
    if not modules:
        raise ValueError("positive_negative: positive and negative are None, expected at least one module to train")
    noisy = noisy_images(batch, key, schedule, tuple(modules))
    error = errors(predict, tuple(modules.values()), noisy).mean(axis=1)
    loss = error.sum()
    return loss, {"loss": loss, **dict(zip(modules, error, strict=True))}
