"""From prompts to images: text encoders, sampler and decoder of one checkpoint, with any guidance rule."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import numpy as np
from tqdm import tqdm

from flax_pref.checkpoints.diffusers import Pipeline
from flax_pref.diffusion.conditioning import chunks, encode_empty, encode_prompts, size_ids
from flax_pref.diffusion.guidance import Row, coefficients, layout
from flax_pref.diffusion.latents import decode_latents
from flax_pref.diffusion.sampler import image_keys, sample
from flax_pref.diffusion.solvers import Solver
from flax_pref.models.lora import bank_predict


@dataclasses.dataclass(frozen=True)
class TextToImage:
    """Draws images for prompts, with one compilation for every layout of rows, whatever their coefficients.

    Attributes:
        pipeline: the checkpoint; its UNet may carry a bank of LoRA modules.
        solver: of the sampling steps.
        size: height and width of the images in pixels.
        batch_size: images per call of the sampler.
        original_size: for SDXL, height and width that the image pretends to have had before it was resized; None: as
            `size`.
        crop_top_left: for SDXL, where the image pretends to have been cropped.
        watch_steps: whether the progress bar counts steps, not images. The program then calls back to the host in every
            step, and such programs are not kept in JAX's compilation cache.
    """

    pipeline: Pipeline
    solver: Solver
    size: tuple[int, int]
    batch_size: int
    original_size: tuple[int, int] | None = None
    crop_top_left: tuple[int, int] = (0, 0)
    watch_steps: bool = False

    def __post_init__(self):
        factor = self.pipeline.vae.config.downscale_factor
        if any(side < 1 or side % factor for side in self.size):
            raise ValueError(f"size={self.size}: height and width must be multiples of {factor}")

    def __call__(
        self,
        prompts: Sequence[str],
        prompt_ids: Sequence[int],
        rows: tuple[Row, ...],
        *,
        seed: int,
        negative_prompts: Sequence[str] | None = None,
        label: str = "sampling",
    ) -> np.ndarray:
        """Draws one image per prompt.

        Args:
            prompts: N texts.
            prompt_ids: N numbers; the noise of an image is a function of its id and the seed alone.
            rows: the guidance rule, see `diffusion.guidance`.
            seed: of all noise.
            negative_prompts: N texts that the "empty" rows of the rule see; None: what the checkpoint means by no
                prompt.
            label: of the progress bar.

        Returns:
            float32 `[N, H, W, 3]` in [0, 1].

        Raises:
            ValueError: the lists are not equally long, or the rule names a network that the UNet has not.
        """
        for name, given in (("prompt_ids", prompt_ids), ("negative_prompts", negative_prompts)):
            if given is not None and len(given) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts, but {len(given)} {name}; expected one for each")
        unet, vae = self.pipeline.unet, self.pipeline.vae
        shape = (*(side // vae.config.downscale_factor for side in self.size), vae.config.latent_channels)
        text, empty = self.conditioning(prompts, negative_prompts)
        prompt_ids = np.asarray(prompt_ids)
        images = []
        batches, steps = list(chunks(len(prompts), self.batch_size)), len(self.solver.timesteps)
        total, unit = (len(batches) * steps, "step") if self.watch_steps else (len(prompts), "image")
        with tqdm(total=total, desc=label, unit=unit) as progress, _watched(progress, self.watch_steps) as bar:
            for chosen, n in batches:
                keys = image_keys(seed, prompt_ids[chosen])
                guidance = (layout(rows), coefficients(rows))
                prompt, no_prompt = ({name: array[chosen] for name, array in part.items()} for part in (text, empty))
                given = (*guidance, self.solver, keys, prompt, no_prompt, shape)
                latents = _sample(unet.graphdef, unet.params, *given, bar)
                images.append(decode_latents(vae, latents)[:n])
                if not self.watch_steps:
                    progress.update(n)
        return np.concatenate(images)

    def conditioning(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None) -> tuple[dict, dict]:
        """What the rows "text" and "empty" see, `[N, ...]` each; see `diffusion.conditioning`."""
        text = encode_prompts(self.pipeline, prompts)
        if negative_prompts is None:
            empty = {
                name: np.broadcast_to(array, (len(prompts), *array.shape))
                for name, array in encode_empty(self.pipeline).items()
            }
        else:
            empty = encode_prompts(self.pipeline, negative_prompts)
        if self.pipeline.unet.config.addition_embed_type == "text_time":
            sizes = size_ids(self.original_size or self.size, self.crop_top_left, self.size)
            text["time_ids"] = empty["time_ids"] = np.tile(sizes, (len(prompts), 1))
        return text, empty


_bars: dict[int, tqdm] = {}
_numbers = itertools.count()


@contextlib.contextmanager
def _watched(bar: tqdm, watch: bool) -> Iterator[np.ndarray | None]:
    """The number under which a running program finds its progress bar: compiled programs outlive bars."""
    if not watch:
        yield None
        return
    number = next(_numbers)
    _bars[number] = bar
    try:
        yield np.int32(number)
    finally:
        jax.effects_barrier()
        del _bars[number]


# At module level, so that what is compiled outlives a TextToImage: a checkpoint with other weights compiles nothing.
@partial(jax.jit, static_argnums=(0, 2, 8))
def _sample(graphdef, params, layout, coefficients, solver, keys, text, empty, shape, bar):
    predict = bank_predict(graphdef, params)

    def watched(*arguments):
        jax.debug.callback(lambda number: _bars[int(number)].update(), bar)
        return predict(*arguments)

    return sample(predict if bar is None else watched, layout, coefficients, solver, keys, text, empty, shape)
