"""Few-step models: what LCM and Euler ancestral draw, with networks that imitate guidance too."""

import dataclasses
import functools
from unittest import mock

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch_pipelines import SCHEDULE, sd15
from torch_reference import SD15_UNET, nchw, nhwc, randomised, relative_error

from flax_pref.checkpoints.diffusers import load_pipeline, load_unet
from flax_pref.config import UserError
from flax_pref.diffusion.conditioning import guidance_embedding
from flax_pref.diffusion.drawing import resolve_drawing
from flax_pref.diffusion.drawing_flags import DrawingFlags
from flax_pref.diffusion.guidance import cfg, cpgd, tabulate
from flax_pref.diffusion.sampler import image_keys, sample
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.models.bank import Bank, Member
from flax_pref.models.unet import UNet2DCondition

# diffusers' and transformers' own housekeeping, none of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]
PROMPTS, SIZE, SEED = ["a lion, red", "a dog"], (24, 32), 3
SHAPE = (SIZE[0] // 4, SIZE[1] // 4, 4)
CONFIG = SD15_UNET | {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
}
COND = 12  # time_cond_proj_dim


def draws(number):
    """What draw `number` of each image is, as torch knows it."""
    return nchw(
        np.stack([jax.random.normal(jax.random.fold_in(key, number), SHAPE) for key in image_keys(SEED, [0, 1])])
    )


def with_our_noise(scheduler):
    """Makes a scheduler draw our noise, step by step."""
    module = diffusers.schedulers.__dict__[type(scheduler).__name__].__module__
    numbers = iter(range(1, 100))
    return mock.patch(f"{module}.randn_tensor", lambda *_, **__: draws(next(numbers)), create=True)


def saved(folder, **change):
    """A small pipeline as a user has it."""
    pipeline = sd15(folder / "tokenizers")
    pipeline.register_modules(unet=randomised(UNet2DConditionModel.from_config({**CONFIG, **change})))
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="module")
def imitating(tmp_path_factory):
    """A pipeline whose UNet imitates guidance."""
    return saved(tmp_path_factory.mktemp("imitating"), time_cond_proj_dim=COND)


def assert_same_images(folder, class_name, steps, scale, **options):
    theirs = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = getattr(diffusers, class_name)(**SCHEDULE, **options)
    pipeline = load_pipeline(folder)
    with with_our_noise(theirs.scheduler):
        expected = theirs(
            PROMPTS,
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=steps,
            guidance_scale=scale,
            latents=draws(0),
            output_type="np",
        ).images
    solver = solver_from_config({**theirs.scheduler.config, "_class_name": class_name}, steps)
    draw = TextToImage(pipeline, solver, SIZE, batch_size=2, imitated_guidance=scale)
    imitates = pipeline.unet.config.time_cond_proj_dim is not None
    images = draw(PROMPTS, range(2), None if imitates else cfg(scale), seed=SEED)
    assert expected.std() > 0.05
    error = np.abs(images - expected).max()
    print(f"{class_name}, {steps} steps: {255 * error:.5f} / 255")
    assert error < 2 / 255
    return draw, images, error


def test_lcm_draws_what_diffusers_draws_with_a_network_that_is_told_the_guidance_scale(imitating):
    draw, images, error = assert_same_images(imitating, "LCMScheduler", 4, 3.5)
    other = dataclasses.replace(draw, imitated_guidance=8.0)(PROMPTS, range(2), seed=SEED)
    assert np.abs(other - images).max() > 4 * error


def test_turbo_draws_what_diffusers_draws_in_one_step_without_guidance(tmp_path):
    assert_same_images(saved(tmp_path), "EulerAncestralDiscreteScheduler", 1, 1.0, timestep_spacing="trailing")


@pytest.mark.parametrize("scale", [1.0, 3.5, 7.5, 12.25])
@pytest.mark.parametrize("size", [256, 12, 13])
def test_the_embedding_of_a_guidance_scale_is_that_of_diffusers(scale, size):
    theirs = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale - 1]), embedding_dim=size
    )[0]
    # Angles up to 11,250, of which float32 knows the third digit after the point.
    np.testing.assert_allclose(guidance_embedding(scale, size), theirs, rtol=0, atol=2e-3)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Networks that imitate guidance, in torch and in a bank."""
    folder, theirs, members = tmp_path_factory.mktemp("networks"), {}, []
    for seed, name in enumerate(("base", "neg")):
        unet = UNet2DConditionModel.from_config({**CONFIG, "time_cond_proj_dim": COND})
        theirs[name] = randomised(unet, seed).eval()
        theirs[name].save_pretrained(folder / name)
        members.append(Member(name, *load_unet(folder / name)[1:]))
    return theirs, Bank(tuple(members))


draw_latents = jax.jit(sample, static_argnames="shape")


def test_contrasts_on_top_of_few_steps_are_those_of_torch_networks_one_after_another(networks):
    theirs, bank = networks
    text = np.random.default_rng(0).standard_normal((2, 5, CONFIG["cross_attention_dim"]), np.float32)
    embedding = np.tile(guidance_embedding(4.0, COND), (2, 1))
    conditioning = {"encoder_hidden_states": text, "timestep_cond": embedding}
    told = {name: torch.from_numpy(array) for name, array in conditioning.items()}
    keys = image_keys(SEED, [0, 1])
    scheduler = diffusers.LCMScheduler(**SCHEDULE)
    scheduler.set_timesteps(4)
    latents = draws(0)
    with torch.no_grad(), with_our_noise(scheduler):
        for t in scheduler.timesteps:
            base, neg = (theirs[name](latents, t, **told).sample for name in ("base", "neg"))
            latents = scheduler.step(base + 2.0 * (base - neg), t, latents).prev_sample
    solver = solver_from_config({**scheduler.config, "_class_name": "LCMScheduler"}, 4)
    table = tabulate(cpgd(2.0, 1.0, positive="base"), 4, 2)
    found = draw_latents(bank, table, solver, keys, conditioning, conditioning, shape=SHAPE)
    assert np.isfinite(found).all()
    assert relative_error(found, nhwc(latents)) < 2e-5


def test_the_guidance_scale_of_the_flags_is_imitated_and_not_applied_twice(imitating):
    flags = functools.partial(DrawingFlags, model=str(imitating), steps=2, solver="lcm")
    drawing = resolve_drawing(flags(guidance_scale="3.5"))
    assert drawing.flags.guidance_scale == "3.5"
    assert (drawing.terms["guidance_scale"], drawing.imitated_guidance) == ("1", 3.5)
    with pytest.raises(UserError, match=r"this UNet is told the scale .* and imitates guidance; expected a number"):
        resolve_drawing(flags(guidance_scale="linear:8:1"))
    assert resolve_drawing(DrawingFlags(model="demo", guidance_scale="3.5")).terms["guidance_scale"] == "3.5"


def test_a_network_that_imitates_no_guidance_is_not_told_any():
    network, condition = mock.Mock(config=mock.Mock(time_cond_proj_dim=None)), np.zeros((1, COND))
    with pytest.raises(ValueError, match=r"timestep_cond .* must not be given to a network with time_cond_proj_dim"):
        UNet2DCondition.embed_time(network, np.zeros(1), None, None, condition)
