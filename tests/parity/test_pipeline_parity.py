"""A user's folder draws the images in JAX that diffusers draws from it."""

import jax
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch_pipelines import sd15, sdxl
from torch_reference import nchw

from flax_pref.checkpoints.diffusers import load_pipeline, save_pipeline
from flax_pref.diffusion.guidance import cfg
from flax_pref.diffusion.sampler import image_keys
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.text_to_image import TextToImage

# diffusers' and transformers' own housekeeping, none of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]

PROMPTS = ["a lion, red", "a dog in a very long dream"]  # the second is longer than the tokenizer's 16
STEPS, SCALE, SIZE = 20, 7.5, (24, 32)
SEED = 3


@pytest.fixture(scope="module", params=[sd15, sdxl], ids=["sd15", "sdxl"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder / "tokenizers").save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def theirs(folder, steps=STEPS, **options):
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    factor = 4
    shape = (SIZE[0] // factor, SIZE[1] // factor, 4)
    noise = np.stack(
        [jax.random.normal(jax.random.fold_in(key, 0), shape) for key in image_keys(SEED, range(len(PROMPTS)))]
    )
    return pipeline(
        PROMPTS,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=steps,
        guidance_scale=SCALE,
        latents=nchw(noise),
        output_type="np",
        **options,
    ).images


def ours(folder, steps=STEPS, negative_prompts=None, **options):
    pipeline = load_pipeline(folder)
    draw = TextToImage(pipeline, solver_from_config(pipeline.scheduler_config, steps), SIZE, batch_size=2, **options)
    with pytest.warns(UserWarning, match="'g dream' of 'a dog in a very long dream'"):
        return draw(PROMPTS, range(len(PROMPTS)), cfg(SCALE), seed=SEED, negative_prompts=negative_prompts)


def largest_error(images, references):
    assert images.shape == references.shape
    assert references.std() > 0.05  # it shows something
    return np.abs(images - references).max()


def test_the_images_are_those_of_diffusers(folder):
    error = largest_error(ours(folder), theirs(folder))
    print(f"{error * 255:.3f} / 255")
    assert error < 2 / 255


def test_negative_prompts_steer_away_from_the_same_things(folder):
    negatives = ["dull", ""]
    assert largest_error(ours(folder, negative_prompts=negatives), theirs(folder, negative_prompt=negatives)) < 2 / 255


def test_what_we_write_draws_the_same_images_in_diffusers(folder, tmp_path):
    save_pipeline(load_pipeline(folder), tmp_path / "export")
    error = largest_error(theirs(tmp_path / "export", 4), theirs(folder, 4))
    assert error == 0


def test_sizes_and_crops_condition_sdxl_as_in_diffusers(folder):
    if "sdxl" not in str(folder):
        pytest.skip("SD1.5 knows no sizes")
    changed = ours(folder, original_size=(48, 20), crop_top_left=(3, 5))
    assert np.abs(changed - ours(folder)).max() > 10 / 255
    assert largest_error(changed, theirs(folder, original_size=(48, 20), crops_coords_top_left=(3, 5))) < 2 / 255


def test_lists_of_other_lengths_are_refused(folder):
    pipeline = load_pipeline(folder)
    draw = TextToImage(pipeline, solver_from_config(pipeline.scheduler_config, 2), SIZE, batch_size=2)
    with pytest.raises(ValueError, match="2 prompts, but 1 negative_prompts"):
        draw(PROMPTS, [0, 1], cfg(SCALE), seed=0, negative_prompts=["one"])
    with pytest.raises(ValueError, match="2 prompts, but 3 prompt_ids"):
        draw(PROMPTS, [0, 1, 2], cfg(SCALE), seed=0)
    with pytest.raises(ValueError, match="multiples of 4"):
        TextToImage(pipeline, solver_from_config(pipeline.scheduler_config, 2), (30, 32), batch_size=2)
