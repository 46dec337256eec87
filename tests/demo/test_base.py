"""The base checkpoint that ships with the package."""

import itertools
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.diffusion.guidance import cfg
from flax_pref.diffusion.sampler import image_keys
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.world import judge
from flax_pref.world import scenes as world

BASE = resources.files("flax_pref.world") / "base"
STEPS, SCALE = 10, 3.0  # the demo's


def scenes(split, count):
    return list(itertools.islice(world.scenes(split, 0), count))


@pytest.fixture(scope="module")
def draw():
    pipeline = load_pipeline(BASE)
    return TextToImage(pipeline, solver_from_config(pipeline.scheduler_config, STEPS), (64, 64), batch_size=32)


def test_it_fits_into_a_package():
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) <= 20e6


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_it_draws_recognisable_scenes(split, draw):
    drawn = scenes(split, 32)
    captions = [scene.caption for scene in drawn]
    images = draw(captions, range(32), cfg(SCALE), seed=0)
    clean = np.stack([world.render(scene, np.random.default_rng(i)) for i, scene in enumerate(drawn)])
    asked = judge.question(captions)
    assert judge.score(images, asked).mean() >= 0.6 * judge.score(clean, asked).mean()


# diffusers' own housekeeping, none of ours.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_diffusers_draws_the_same_image_from_it(draw):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    caption = scenes("train", 1)[0].caption
    ours = draw([caption], [5], cfg(SCALE), seed=1)[0]
    key = jax.random.fold_in(image_keys(1, [5])[0], 0)
    noise = np.array(jax.random.normal(key, (8, 8, 8), jnp.float32))
    theirs = pipeline(
        caption,
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        latents=torch.from_numpy(noise.transpose(2, 0, 1)[None]),
        output_type="np",
    ).images[0]
    assert np.abs(ours - theirs).max() < 1e-3
