"""The objective of the autoencoder (arXiv:2112.10752, equation 25, without the adversarial and perceptual terms)."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp


def autoencoding(
    encode: Callable, decode: Callable, batch: Mapping[str, jax.Array], key: jax.Array, *, kl_weight: float = 1e-4
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error of the pixels and of their differences, and a weak pull of the latents to N(0, 1).

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
