"""Between images and the latents of diffusion: the autoencoder with its scaling factor, a few images at a time."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from flax_pref.diffusion.conditioning import chunks
from flax_pref.models.network import Network
from flax_pref.shapes import Array, Decoded, Float, GivenLatents, ImageKeys, Latents

# Pixels per call of the autoencoder: one image of 1024 x 1024, four of 512 x 512. Its activations at full resolution
# have 128 channels and more, so a whole batch of images at once would set the memory peak of everything.
PIXELS = 2**20


def encode_images(
    vae: Network,
    images: Float[Array, "images image_height image_width 3"],
    *,
    keys: ImageKeys | None = None,
    label: str = "encoding",
) -> Float[np.ndarray, "images height width channels"]:
    """Scaled latents of images.

    Args:
        vae: the autoencoder.
        images: in [0, 1].
        keys: one per image, to sample the posterior; None for its mode.
        label: of the progress bar.

    Returns:
        float32, times the config's scaling_factor.
    """
    latents = []
    with tqdm(total=len(images), desc=label, unit="image") as progress:
        for chosen, n in chunks(len(images), min(len(images), _images_per_call(images.shape[1:3]))):
            moments = _image_encoder(vae.graphdef, vae.params, images[chosen])
            drawn = _mode(*moments) if keys is None else _draw(*moments, keys[chosen])
            latents.append(vae.config.scaling_factor * np.asarray(drawn)[:n])
            progress.update(n)
    return np.concatenate(latents)


def draw_latents(batch: Mapping[str, Any], key: jax.Array, scaling_factor: float) -> dict[str, Any]:
    """A batch of pairs with latents drawn from their posteriors, mean + exp(logvar / 2) noise, instead of the moments.

    Args:
        batch: `winner` and `loser` `[B, h, w, 2 Z]`, mean and logarithm of the variance; `row` `[B]`.
        key: of this step. Each image has its own, from this one, its pair's row and whether it is the winner.
        scaling_factor: of the autoencoder.

    Returns:
        The batch with `winner` and `loser` float32 `[B, h, w, Z]`, scaled.
    """
    latents = {}
    for i, image in enumerate(("winner", "loser")):
        keys = jax.vmap(lambda row, i=i: jax.random.fold_in(jax.random.fold_in(key, row), i))(batch["row"])
        latents[image] = scaling_factor * _draw(*_moments(batch[image]), keys)
    return {**batch, **latents}


def latent_modes(batch: Mapping[str, Any], scaling_factor: float) -> dict[str, Any]:
    """A batch of pairs with the modes of their posteriors instead of the moments; see `draw_latents`."""
    return {**batch, **{image: scaling_factor * _mode(*_moments(batch[image])) for image in ("winner", "loser")}}


def _moments(stored: Float[Array, "images height width moments"]) -> tuple[Latents, Latents]:
    mean, logvar = jnp.split(stored.astype(jnp.float32), 2, axis=-1)
    return mean, logvar


def decode_latents(vae: Network, latents: GivenLatents, *, shards: int = 1) -> Decoded:
    """Images of latents, a few at a time, in one program; it does not wait for the result.

    Args:
        vae: the autoencoder.
        latents: scaled.
        shards: number of devices that the batch is divided over, which divides B; they decode at the same time.

    Returns:
        float32 in [0, 1], on the devices.
    """
    size = [side * vae.config.downscale_factor for side in latents.shape[1:3]]
    own = len(latents) // shards
    at_once = max(n for n in range(1, min(own, _images_per_call(size)) + 1) if own % n == 0)
    return _decoder_in_turns(vae.graphdef, vae.params, latents / vae.config.scaling_factor, shards, at_once)


def _images_per_call(size) -> int:
    return max(1, PIXELS // (size[0] * size[1]))


# At module level, so that what is compiled outlives a call: a checkpoint with other weights compiles nothing.


@partial(jax.jit, static_argnums=0)
def _image_encoder(graphdef: nnx.GraphDef, params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean, logvar = nnx.merge(graphdef, params).encode(2 * images - 1)
    return mean.astype(jnp.float32), logvar.astype(jnp.float32)


def _mode(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    return mean


@jax.jit
def _draw(mean: jax.Array, logvar: jax.Array, keys: jax.Array) -> jax.Array:
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], jnp.float32))(keys)
    return mean + jnp.exp(logvar / 2) * noise


@partial(jax.jit, static_argnums=0)
def _decoder(graphdef: nnx.GraphDef, params: dict, latents: jax.Array) -> jax.Array:
    images = nnx.merge(graphdef, params).decode(latents)
    return jnp.clip((images.astype(jnp.float32) + 1) / 2, 0, 1)


@partial(jax.jit, static_argnums=(0, 3, 4))
def _decoder_in_turns(graphdef: nnx.GraphDef, params: dict, latents: jax.Array, shards: int, at_once: int) -> jax.Array:
    """`at_once` images of each shard at a time."""
    shape = latents.shape[1:]
    groups = latents.reshape(shards, -1, at_once, *shape).swapaxes(0, 1)  # [turns, shards, at_once, h, w, Z]
    images = jax.lax.map(lambda group: _decoder(graphdef, params, group.reshape(-1, *shape)), groups)
    images = images.reshape(len(groups), shards, at_once, *images.shape[2:])
    return images.swapaxes(0, 1).reshape(-1, *images.shape[3:])
