"""Draws images from a Stable Diffusion checkpoint, on whatever device JAX has.

    python -m sample.images --model PATH_OR_ID --prompt "a lighthouse in a storm" --seed 0 --out runs/images

The checkpoint is a folder in the layout of diffusers, or the Hub id of one: Stable Diffusion 1.x, 2.x or XL.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flax_pref.checkpoints.diffusers import Pipeline, load_pipeline
from flax_pref.checkpoints.hub import find_checkpoint
from flax_pref.checkpoints.weights import Network
from flax_pref.config import UserError, check_output_folder, parse_flags, run_main
from flax_pref.diffusion.guidance import cfg
from flax_pref.diffusion.solvers import Solver, from_config
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.files import replacing
from flax_pref.models.attention import Kernel
from flax_pref.models.unet import set_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Draws images from a Stable Diffusion checkpoint."""

    model: str
    """Folder in the layout of diffusers, or Hub id."""
    prompt: tuple[str, ...]
    """One text or several."""
    negative_prompt: str | None = None
    """What to steer away from."""
    out: Path = Path("runs/images")
    """Folder for the PNG files."""
    seed: int = 0
    """Of the first image of every prompt; the others have the seeds after it."""
    images_per_prompt: int = 1
    steps: int = 50
    guidance_scale: float = 7.5
    """Of classifier-free guidance; 1 is none."""
    solver: Literal["ddim", "dpm++", "dpm++_karras", "euler", "euler_karras", "pndm"] | None = None
    """None: the one of the checkpoint's scheduler."""
    height: int | None = None
    """In pixels; None: the size that the network was trained on."""
    width: int | None = None
    batch_size: int = 1
    """Images that are drawn at the same time."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the networks compute in; auto: bfloat16 on TPUs and GPUs, float32 on CPUs."""
    variant: str | None = None
    """Of the weight files, e.g. fp16; None: the full ones, or what is there."""
    attention: Kernel = "auto"
    """Kernel of the UNet's attention; auto: the fastest for the device."""


def main(arguments: list[str]) -> None:
    """Draws and writes the images."""
    config = parse_flags(arguments, Config)
    check_output_folder(config.out)
    folder = find_checkpoint(config.model, variant=config.variant)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    print(f"loading {folder} on {jax.devices()[0].device_kind} in {dtype}")
    pipeline = load_pipeline(folder, jnp.dtype(dtype), variant=config.variant)
    pipeline = dataclasses.replace(pipeline, unet=with_attention(pipeline.unet, config.attention))
    draw = TextToImage(
        pipeline,
        solver_of(pipeline, folder, config),
        size_of(pipeline, config),
        batch_size=config.batch_size,
        watch_steps=True,
    )
    for prompt_id, seed, image in images(draw, config):
        file = config.out / f"{prompt_id:05d}-{seed}.png"
        with replacing(file) as unfinished:
            Image.fromarray(np.round(255 * image).astype(np.uint8)).save(
                unfinished, format="png", pnginfo=describe(config, prompt_id, seed)
            )
        print(f"wrote {file}")


def images(draw: TextToImage, config: Config) -> Iterator[tuple[int, int, np.ndarray]]:
    """`(prompt_id, seed, image [H, W, 3])` of all images, seed by seed."""
    negative = None if config.negative_prompt is None else [config.negative_prompt] * len(config.prompt)
    for seed in range(config.seed, config.seed + config.images_per_prompt):
        ids = range(len(config.prompt))
        drawn = draw(
            config.prompt, ids, cfg(config.guidance_scale), seed=seed, negative_prompts=negative, label=f"seed {seed}"
        )
        for prompt_id, image in zip(ids, drawn, strict=True):
            yield prompt_id, seed, image


def with_attention(network: Network, kernel: Kernel) -> Network:
    """The UNet with another kernel for its attention."""
    unet = nnx.merge(network.graphdef, network.params)
    set_attention(unet, kernel)
    return network._replace(graphdef=nnx.split(unet)[0])


def solver_of(pipeline: Pipeline, folder: Path, config: Config) -> Solver:
    """The solver that the config names, or the checkpoint."""
    try:
        return from_config(pipeline.scheduler_config, config.steps, name=config.solver)
    except (ValueError, TypeError) as error:
        file = folder / "scheduler" / "scheduler_config.json"
        raise UserError(f"{file}: {error}; --solver chooses another one, --steps their number") from error


def size_of(pipeline: Pipeline, config: Config) -> tuple[int, int]:
    """Height and width in pixels."""
    trained = pipeline.unet.config.sample_size or 64
    trained = trained if isinstance(trained, tuple) else (trained, trained)
    sides = (config.height, config.width)
    factor = pipeline.vae.config.downscale_factor
    return tuple(factor * default if side is None else side for side, default in zip(sides, trained, strict=True))


def describe(config: Config, prompt_id: int, seed: int) -> PngInfo:
    """What makes the image again, as text in its file."""
    info = PngInfo()
    settings = {
        **{"prompt": config.prompt[prompt_id], "negative_prompt": config.negative_prompt, "prompt_id": prompt_id},
        **{"seed": seed, "model": config.model, "steps": config.steps, "guidance_scale": config.guidance_scale},
        **{"solver": config.solver or "of the checkpoint"},
    }
    for name, value in settings.items():
        if value is not None:
            info.add_itxt(name, str(value))
    return info


if __name__ == "__main__":
    sys.exit(run_main(main))
