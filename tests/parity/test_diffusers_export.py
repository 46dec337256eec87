"""Folders of `sample.export --format diffusers` draw in diffusers what we draw from the same initial latents."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch_pipelines import sd15, sdxl
from torch_reference import nchw, randomised

from flax_pref.checkpoints.checkpoint import Checkpoint
from flax_pref.config import UserError
from flax_pref.diffusion.drawing import resolve_drawing
from flax_pref.diffusion.drawing_flags import DrawingFlags
from flax_pref.diffusion.sampler import image_keys
from sample import export

# diffusers' and transformers' own housekeeping, none of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]
FAMILIES = {"sd15": sd15, "sdxl": sdxl}
PROMPTS, SEED, SIZE = ["a lion, red", "a dog"], 3, (24, 32)
CPGD = {"rule": "cpgd", "w": "2", "guidance_scale": "5"}


def saved(pipeline, folder):
    """The folders of a base, of LoRA modules and of modules with full weights."""
    pipeline.save_pretrained(folder / "base")
    unet = folder / "base" / "unet"
    for seed, name in enumerate(("pos", "neg"), 1):
        adapted = UNet2DConditionModel.from_pretrained(unet)
        adapted.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v", "proj_in", "time_emb_proj"]))
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
        adapted.save_lora_adapter(folder, weight_name=f"{name}.safetensors")
        full = UNet2DConditionModel.from_pretrained(unet)
        generator = torch.Generator().manual_seed(seed)
        for parameter in full.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        full.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return saved(FAMILIES[request.param](folder / "tokenizers"), folder)


def flags_of(folder, steps=20, full=(), modules=("pos", "neg"), **flags):
    """As arguments of `DrawingFlags`."""
    paths = [f"{name}={folder / name}" + ("" if name in full else ".safetensors") for name in modules]
    size = {"height": SIZE[0], "width": SIZE[1]}
    return {"model": str(folder / "base"), "module": tuple(paths), "steps": steps, **size, **flags}


def exported(out, flags, *more):
    arguments = ["--format", "diffusers", "--out", str(out), *more]
    for name, value in flags.items():
        for one in value if isinstance(value, tuple) else (value,):
            arguments += [f"--{name.replace('_', '-')}", str(one)]
    export.main(arguments)
    return load(out)


def load(out):
    pipeline = DiffusionPipeline.from_pretrained(out, custom_pipeline=out / "pipeline.py", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(channels=4, factor=4):
    shape = (SIZE[0] // factor, SIZE[1] // factor, channels)
    keys = image_keys(SEED, range(len(PROMPTS)))
    return nchw(np.stack([jax.random.normal(jax.random.fold_in(key, 0), shape) for key in keys]))


def theirs(pipeline, **options):
    return pipeline(PROMPTS, latents=noise(), output_type="np", **options).images


def ours(flags):
    drawing = resolve_drawing(DrawingFlags(**flags))
    draw = drawing.load(dtype="float32", batch_size=len(PROMPTS))
    return draw(PROMPTS, range(len(PROMPTS)), drawing.sampled, seed=SEED)


def largest_error(images, references):
    assert images.shape == references.shape
    assert references.std() > 0.05  # it shows something
    error = np.abs(images - references).max()
    print(f"{255 * error:.4f} / 255")
    return error


def test_a_lora_pair_guides_in_diffusers_as_here(folder, tmp_path):
    flags = flags_of(folder, **CPGD)
    references = ours(flags)
    pipeline = exported(tmp_path / "out", flags)
    assert largest_error(theirs(pipeline), references) < 2 / 255
    # The modules count.
    assert np.abs(theirs(pipeline, w=0) - references).max() > 10 / 255
