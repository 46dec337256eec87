"""Between images and the latents of diffusion: the autoencoder with its scaling factor, a few images at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from flax_pref.checkpoints.weights import Network
from flax_pref.diffusion.conditioning import chunks

# Pixels per call of the autoencoder: one image of 1024 x 1024, four of 512 x 512. Its activations at full resolution
# have 128 channels and more, so a whole batch of images at once would set the memory peak of everything.
PIXELS = 2**20


def encode_images(
    vae: Network, images: np.ndarray, *, keys: jax.Array | None = None, label: str = "encoding"
) -> np.ndarray:
    """Scaled latents of images.

    Args:
        vae: the autoencoder.
        images: `[N, H, W, 3]` in [0, 1].
        keys: `[N]`, one per image, to sample the posterior; None for its mode.
        label: of the progress bar.

    Returns:
        float32 `[N, h, w, Z]`, times the config's scaling_factor.
    """
    latents = []
    with tqdm(total=len(images), desc=label, unit="image") as progress:
        for chosen, n in chunks(len(images), min(len(images), _images_per_call(images.shape[1:3]))):
            moments = _encode(vae.graphdef, vae.params, images[chosen])
            drawn = _mode(*moments) if keys is None else _draw(*moments, keys[chosen])
            latents.append(vae.config.scaling_factor * np.asarray(drawn)[:n])
            progress.update(n)
    return np.concatenate(latents)


def decode_latents(vae: Network, latents: jax.Array) -> np.ndarray:
    """Images float32 `[N, H, W, 3]` in [0, 1] of scaled latents `[N, h, w, Z]`."""
    size = [side * vae.config.downscale_factor for side in latents.shape[1:3]]
    images = [
        np.asarray(_decode(vae.graphdef, vae.params, latents[chosen] / vae.config.scaling_factor))[:n]
        for chosen, n in chunks(len(latents), min(len(latents), _images_per_call(size)))
    ]
    return np.concatenate(images)


def _images_per_call(size) -> int:
    return max(1, PIXELS // (size[0] * size[1]))


# At module level, so that what is compiled outlives a call: a checkpoint with other weights compiles nothing.


@partial(jax.jit, static_argnums=0)
def _encode(graphdef: nnx.GraphDef, params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    moments = nnx.merge(graphdef, params).encode(2 * images - 1)
    return tuple(moment.astype(jnp.float32) for moment in moments)


def _mode(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    return mean


@jax.jit
def _draw(mean: jax.Array, logvar: jax.Array, keys: jax.Array) -> jax.Array:
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], jnp.float32))(keys)
    return mean + jnp.exp(logvar / 2) * noise


@partial(jax.jit, static_argnums=0)
def _decode(graphdef: nnx.GraphDef, params: dict, latents: jax.Array) -> jax.Array:
    images = nnx.merge(graphdef, params).decode(latents)
    return jnp.clip((images.astype(jnp.float32) + 1) / 2, 0, 1)
