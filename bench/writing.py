"""How much of the time goes to sampling while the images before are encoded and written in the background."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from bench.common import random_network
from bench.guidance import sampler, sampler_inputs
from flax_pref.data.prompts import Prompt
from flax_pref.diffusion.guidance import cfg
from flax_pref.diffusion.latents import decode_latents
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.text_to_image import to_bytes
from flax_pref.images.image_files import ImageFormat
from flax_pref.images.image_set import ImageSet, Item, Writer
from flax_pref.models.platform import default_dtype
from flax_pref.models.presets import FAMILIES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """Measures the share of the time that goes to sampling while images are written."""

    images: int = 128
    batch_size: int = 4
    size: int = 512
    """Side of the images in pixels."""
    formats: tuple[ImageFormat, ...] = ("png", "webp")
    seconds_per_image: float = 0.5
    """Of the simulated device, which computes elsewhere: the host only waits for it."""
    real: bool = False
    """Draw with a network of random weights on the device that JAX has, instead of simulating one."""
    family: Literal["sd15", "sdxl"] = "sd15"
    """Of the real network."""
    steps: int = 2
    """Of the real sampler."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the real network computes in; auto: bfloat16 on TPUs and GPUs, float32 on CPUs."""
    folder: Path | None = None
    """Where a folder for the images is made, and removed; None: where temporary files go."""
    json: Path | None = None
    """File for the figures."""


def bench_writing(bench: Writing) -> dict:
    """Share of sampling in the time that an image set takes, and what the writer does at most, for each format."""
    if bench.images < 1 or bench.batch_size < 1:
        raise ValueError(f"bench: {bench.images} images in batches of {bench.batch_size}; expected at least one")
    photos = random_photos(8, bench.size)
    draw = real_device(bench) if bench.real else simulated_device(photos, bench)
    figures = {
        **{"size": bench.size, "images": bench.images, "batch_size": bench.batch_size, "real": bench.real},
        **{"seconds_per_image": None if bench.real else bench.seconds_per_image},
        **{"device": jax.devices()[0].device_kind if bench.real else "simulated", "formats": {}},
    }
    for image_format in bench.formats:
        row = fill_image_set(draw, image_format, bench)
        at_once = dataclasses.replace(bench, seconds_per_image=0.0)
        limit = fill_image_set(simulated_device(photos, at_once), image_format, at_once)
        row["most_images_per_second"] = limit["images_per_second"]
        figures["formats"][image_format] = row
    return figures


def fill_image_set(draw: Callable[[int], Any], image_format: ImageFormat, bench: Writing) -> dict:
    """Draws and writes all images as a program does; what of the time was spent in `draw`."""
    items = [Item(Prompt(i, f"prompt {i}", "", {}), 0) for i in range(bench.images)]
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        image_set = ImageSet(Path(folder) / "images", items, {"bench": "writing"}, image_format=image_format)
        image_set.begin()
        sampling, started = 0.0, time.perf_counter()
        with Writer(image_set) as writer:
            for chosen in np.split(image_set.pending, range(bench.batch_size, bench.images, bench.batch_size)):
                asked = time.perf_counter()
                images = jax.block_until_ready(draw(bench.batch_size))[: len(chosen)]
                sampling += time.perf_counter() - asked
                writer.put(chosen, images)
        written = time.perf_counter()
        image_set.finish()
        finished = time.perf_counter()
        stored = sum(file.stat().st_size for file in Path(folder).rglob("*.tar"))
    return {
        "share_of_sampling": round(sampling / (finished - started), 4),
        "share_until_written": round(sampling / (written - started), 4),  # without what comes once, at the end
        "seconds": round(finished - started, 2),
        "sampling_seconds": round(sampling, 2),
        "manifest_and_sheet_seconds": round(finished - written, 2),
        "images_per_second": round(bench.images / (written - started), 2),
        "kb_per_image": round(stored / bench.images / 1000, 1),
    }


def random_photos(count: int, size: int) -> np.ndarray:
    """Images that compress like photographs, uint8 `[count, size, size, 3]`: smooth, with the grain of a film."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 16, 16, 3), np.uint8)
    smooth = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in coarse]
    grain = 4 * rng.standard_normal((count, size, size, 3), dtype=np.float32)
    return np.clip(np.stack(smooth) + grain, 0, 255).astype(np.uint8)


def simulated_device(photos: np.ndarray, bench: Writing) -> Callable[[int], np.ndarray]:
    """Images after the time that a device would take, which leaves the host to others."""

    def draw(count):
        time.sleep(count * bench.seconds_per_image)
        return photos[np.arange(count) % len(photos)]

    return draw


def real_device(bench: Writing) -> Callable[[int], jax.Array]:
    """The sampler with classifier-free guidance and the decoder, compiled."""
    family, dtype = FAMILIES[bench.family], default_dtype(bench.dtype)
    unet, vae = (random_network(kind, getattr(family, kind), jnp.dtype(dtype)) for kind in ("unet", "vae"))
    latent_size = bench.size // vae.config.downscale_factor
    solver = solver_from_config(family.scheduler_config, bench.steps, name="ddim")
    program = sampler(unet, cfg(7.5), solver, bench.batch_size, latent_size)
    inputs = sampler_inputs(family, bench.batch_size, latent_size)

    def draw(count):
        return to_bytes(decode_latents(vae, program(unet.params, *inputs)))

    jax.block_until_ready(draw(bench.batch_size))
    return draw
