"""Preference pairs as latents and encoded captions: what the objectives consume."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from flax_pref.checkpoints.diffusers import Network, Pipeline
from flax_pref.data.pick_a_pic import PreferencePair, decode_image
from flax_pref.diffusion.text_to_image import chunks, encode_prompts


class EncodedPairs(NamedTuple):
    """N preference pairs in memory; latents are scaled by the autoencoder's scaling_factor."""

    winner: np.ndarray  # [N, h, w, Z]
    loser: np.ndarray  # [N, h, w, Z]
    text: np.ndarray  # [N, T, D]
    empty: np.ndarray  # [T, D] the encoded empty caption

    def batches(self, batch_size: int, *, caption_dropout: float, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Endless batches `{"winner", "loser", "text"}`: shuffled epochs, a share of the captions left out."""
        rng = np.random.default_rng(seed)
        order = np.empty(0, int)
        while True:
            while len(order) < batch_size:
                order = np.concatenate([order, rng.permutation(len(self.winner))])
            rows, order = order[:batch_size], order[batch_size:]
            dropped = rng.random((batch_size, 1, 1)) < caption_dropout
            yield {
                "winner": self.winner[rows],
                "loser": self.loser[rows],
                "text": np.where(dropped, self.empty, self.text[rows]),
            }


def encode_images(vae: Network, images: np.ndarray, *, batch_size: int = 64, label: str = "encoding") -> np.ndarray:
    """Scaled latents `[N, h, w, Z]`, the means of their posterior, of images `[N, H, W, 3]` in [0, 1]."""

    @jax.jit
    def encode(params, images):
        mean, _ = nnx.merge(vae.graphdef, params).encode(2 * images - 1)
        return vae.config.scaling_factor * mean.astype(jnp.float32)

    latents = []
    with tqdm(total=len(images), desc=label, unit="image") as progress:
        for chosen, n in chunks(len(images), batch_size):
            latents.append(np.asarray(encode(vae.params, images[chosen]))[:n])
            progress.update(n)
    return np.concatenate(latents)


def encode_pairs(pipeline: Pipeline, pairs: Sequence[PreferencePair]) -> EncodedPairs:
    """Decodes the images of pairs and encodes images and captions.

    Args:
        pipeline: whose autoencoder and text encoder are used.
        pairs: N pairs; all images of one size.

    Raises:
        ValueError: an image cannot be decoded; names it.
    """
    images = np.stack(
        [
            decode_image(image, f"image {uid!r} of {pair.caption!r}")
            for pair in pairs
            for image, uid in ((pair.winner, pair.winner_uid), (pair.loser, pair.loser_uid))
        ]
    )
    latents = encode_images(pipeline.vae, images, label="encoding pairs")
    *text, empty = encode_prompts(pipeline, [*(pair.caption for pair in pairs), ""])
    return EncodedPairs(latents[0::2], latents[1::2], np.stack(text), empty)
