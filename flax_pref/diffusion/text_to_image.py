"""From prompts to images: text encoder, sampler and decoder of one checkpoint, with any guidance rule."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from flax_pref.checkpoints.diffusers import Pipeline
from flax_pref.diffusion.guidance import Row, coefficients, layout
from flax_pref.diffusion.sampler import image_keys, sample
from flax_pref.diffusion.solvers import Solver
from flax_pref.models.lora import bank_predict


def chunks(count: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """`(indices [size], n)` that cover `range(count)`; the last chunk is filled up by repeating its first index.

    All chunks have one size, so that a function compiled for one serves all; the first n results are wanted.
    """
    for start in range(0, count, size):
        wanted = np.arange(start, min(start + size, count))
        yield np.concatenate([wanted, np.full(size - len(wanted), start)]), len(wanted)


def encode_prompts(pipeline: Pipeline, prompts: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
    """Hidden states of the text encoder, float32 `[N, T, D]`; equal prompts are encoded once."""
    encoder = pipeline.text_encoder
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    ids = pipeline.tokenizer(list(place))
    states = [
        np.asarray(_encode(encoder.graphdef, encoder.params, ids[chosen]))[:n]
        for chosen, n in chunks(len(ids), batch_size)
    ]
    return np.concatenate(states)[[place[prompt] for prompt in prompts]]


@dataclasses.dataclass(frozen=True)
class TextToImage:
    """Draws images for prompts, with one compilation for every layout of rows, whatever their coefficients.

    Attributes:
        pipeline: the checkpoint; its UNet may carry a bank of LoRA modules.
        solver: of the sampling steps.
        size: height and width of the images in pixels.
        batch_size: images per call of the sampler.
    """

    pipeline: Pipeline
    solver: Solver
    size: tuple[int, int]
    batch_size: int

    def __call__(
        self,
        prompts: Sequence[str],
        prompt_ids: Sequence[int],
        rows: tuple[Row, ...],
        *,
        seed: int,
        label: str = "sampling",
    ) -> np.ndarray:
        """Draws one image per prompt.

        Args:
            prompts: N texts.
            prompt_ids: N numbers; the noise of an image is a function of its id and the seed alone.
            rows: the guidance rule, see `diffusion.guidance`.
            seed: of all noise.
            label: of the progress bar.

        Returns:
            float32 `[N, H, W, 3]` in [0, 1].
        """
        unet, vae = self.pipeline.unet, self.pipeline.vae
        shape = (*(side // vae.config.downscale_factor for side in self.size), vae.config.latent_channels)
        *text, empty = encode_prompts(self.pipeline, [*prompts, ""])
        text, prompt_ids = np.stack(text), np.asarray(prompt_ids)
        images = []
        with tqdm(total=len(prompts), desc=label, unit="image") as progress:
            for chosen, n in chunks(len(prompts), self.batch_size):
                keys = image_keys(seed, prompt_ids[chosen])
                guidance = (layout(rows), coefficients(rows))
                latents = _sample(unet.graphdef, unet.params, *guidance, self.solver, keys, text[chosen], empty, shape)
                images.append(np.asarray(_decode(vae.graphdef, vae.params, latents / vae.config.scaling_factor))[:n])
                progress.update(n)
        return np.concatenate(images)


# At module level, so that what is compiled outlives a TextToImage: a checkpoint with other weights compiles nothing.


@partial(jax.jit, static_argnums=0)
def _encode(graphdef, params, input_ids):
    return nnx.merge(graphdef, params)(input_ids).last_hidden_state.astype(jnp.float32)


@partial(jax.jit, static_argnums=(0, 2, 8))
def _sample(graphdef, params, layout, coefficients, solver, keys, text, empty, shape):
    return sample(bank_predict(graphdef, params), layout, coefficients, solver, keys, text, empty, shape)


@partial(jax.jit, static_argnums=0)
def _decode(graphdef, params, latents):
    images = nnx.merge(graphdef, params).decode(latents)
    return jnp.clip((images.astype(jnp.float32) + 1) / 2, 0, 1)
