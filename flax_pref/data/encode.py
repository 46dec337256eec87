"""Preference pairs as latents and encoded captions: what the objectives consume."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flax_pref.checkpoints.diffusers import Pipeline
from flax_pref.data.pick_a_pic import PreferencePair, decode_image
from flax_pref.diffusion.conditioning import encode_empty, encode_prompts
from flax_pref.diffusion.latents import encode_images


class EncodedPairs(NamedTuple):
    """N preference pairs in memory; latents are scaled by the autoencoder's scaling_factor."""

    winner: np.ndarray  # [N, h, w, Z]
    loser: np.ndarray  # [N, h, w, Z]
    text: dict[str, np.ndarray]  # [N, ...] each, see diffusion.conditioning
    empty: dict[str, np.ndarray]  # [...] the same of no caption

    def batches(self, batch_size: int, *, caption_dropout: float, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Endless batches `{"winner", "loser", "text"}`: shuffled epochs, a share of the captions left out."""
        rng = np.random.default_rng(seed)
        order = np.empty(0, int)
        while True:
            while len(order) < batch_size:
                order = np.concatenate([order, rng.permutation(len(self.winner))])
            rows, order = order[:batch_size], order[batch_size:]
            text = {name: array[rows] for name, array in self.text.items()}
            dropped = rng.random(batch_size) < caption_dropout
            for name, array in self.empty.items():
                text[name][dropped] = array
            yield {"winner": self.winner[rows], "loser": self.loser[rows], "text": text}


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
    text = encode_prompts(pipeline, [pair.caption for pair in pairs])
    return EncodedPairs(latents[0::2], latents[1::2], text, encode_empty(pipeline))
