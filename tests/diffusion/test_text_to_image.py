"""From prompts to images, on the smallest SDXL checkpoint, whose empty prompt is zeros."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from training.tiny import tiny_checkpoint

from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.checkpoints.lora import lora_network
from flax_pref.diffusion import text_to_image
from flax_pref.diffusion.conditioning import encode_batch
from flax_pref.diffusion.guidance import cfg, chats, npo, tabulate
from flax_pref.diffusion.sampler import image_keys
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.text_to_image import TextToImage, to_bytes
from flax_pref.models.lora import join_lora, split_lora
from flax_pref.serving.export import export_sampler
from flax_pref.serving.sampler import load_sampler

PROMPTS, S = ["a cat", "a dog"], 3.0
TERMS = {"name": "chats", "guidance_scale": S, "proxy": 0.5}


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """A positive and a negative module of random weights."""
    pipeline = load_pipeline(tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "sdxl", "sdxl"))
    assert pipeline.force_zeros_for_empty_prompt
    unet = lora_network(pipeline.unet, ("pos", "neg"), rank=2, alpha=2, key=jax.random.key(0))
    base, lora = split_lora(unet.params)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda leaf: leaf + 0.5 * rng.standard_normal(leaf.shape, np.float32), lora)
    unet = unet._replace(params=join_lora(base, lora))
    pipeline = dataclasses.replace(pipeline, unet=unet)
    return TextToImage(pipeline, solver_from_config(pipeline.scheduler_config, 3), (16, 16), len(PROMPTS))


def images(draw, rule, **options):
    return draw(PROMPTS, range(len(PROMPTS)), rule, seed=0, **options)


def test_the_proxy_of_chats_is_made_of_the_encoded_empty_text_though_the_empty_prompt_is_zeros(draw):
    # With a = 0 the proxy is the empty text itself, which is also what the negative prompt "" encodes.
    expected = images(draw, npo(S), negative_prompts=[""] * len(PROMPTS))
    assert np.abs(expected - images(draw, npo(S))).max() > 1e-3
    np.testing.assert_allclose(images(draw, chats(S, proxy=0.0)), expected, atol=1e-5)


def test_the_proxy_of_chats_is_not_made_of_a_negative_prompt(draw):
    plain = images(draw, chats(S))
    np.testing.assert_array_equal(images(draw, chats(S), negative_prompts=["the sea"] * len(PROMPTS)), plain)


def test_an_exported_sampler_of_chats_makes_the_same_proxy(draw, tmp_path):
    export_sampler(draw, TERMS, tmp_path / "chats", platforms=["cpu"], about={})
    exported = load_sampler(tmp_path / "chats")(PROMPTS, range(len(PROMPTS)), seed=0)
    np.testing.assert_array_equal(exported, np.round(255 * images(draw, chats(S))).astype(np.uint8))


def test_a_checkpoint_says_with_which_solver_and_in_which_size_it_draws(draw):
    pipeline = draw.pipeline
    default = TextToImage(pipeline)
    np.testing.assert_array_equal(default.solver.timesteps, solver_from_config(pipeline.scheduler_config, 50).timesteps)
    assert default.size == (16, 16) and default.batch_size == 1
    steps = TextToImage(pipeline, steps=3)
    np.testing.assert_array_equal(steps.solver.timesteps, draw.solver.timesteps)
    assert dataclasses.replace(steps, batch_size=2).solver is steps.solver
    with pytest.raises(ValueError, match="steps=3 beside a solver"):
        TextToImage(pipeline, draw.solver, steps=3)


@pytest.fixture(scope="module")
def others(draw):
    """The text encoders with another bias each."""
    changed = []
    for encoder in draw.pipeline.text_encoders:
        params = flatten_dict(encoder.params)
        bias = next(path for path in params if path[-2:] == ("fc1", "bias"))
        changed.append(encoder._replace(params=unflatten_dict(params | {bias: params[bias] + 1.0})))
    return tuple(changed)


@pytest.mark.parametrize("negative", [None, ["the sea", ""]])
def test_a_module_with_text_encoders_of_its_own_draws_as_a_checkpoint_with_these(draw, others, negative):
    own = dataclasses.replace(draw, text_encoders={"pos": others})
    whole = dataclasses.replace(draw, pipeline=draw.pipeline.replace(text_encoders=others))
    options = {"negative_prompts": negative}
    expected = images(whole, cfg(S, "pos"), **options)
    assert np.abs(expected - images(draw, cfg(S, "pos"), **options)).max() > 1e-3
    np.testing.assert_allclose(images(own, cfg(S, "pos"), **options), expected, atol=1e-6)
    np.testing.assert_array_equal(images(own, cfg(S), **options), images(draw, cfg(S), **options))


def test_the_same_text_encoders_encode_once(draw, others, monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return encode_batch(*arguments, **options)

    monkeypatch.setattr(text_to_image, "encode_batch", counted)
    both = dataclasses.replace(draw, text_encoders={"pos": others, "neg": others})
    images(both, npo(S))
    assert len(calls) == 2
    with pytest.raises(ValueError, match='text_encoders has "base"'):
        dataclasses.replace(draw, text_encoders={"base": others})


def test_an_exported_sampler_has_the_text_encoders_of_modules(draw, others, tmp_path):
    own = dataclasses.replace(draw, text_encoders={"pos": others, "neg": draw.pipeline.text_encoders})
    export_sampler(own, TERMS, tmp_path / "own", platforms=["cpu"], about={})
    sampler, negatives = load_sampler(tmp_path / "own"), ["the sea", "a cat"]
    expected = images(own, chats(S), negative_prompts=negatives)
    assert np.abs(expected - images(draw, chats(S), negative_prompts=negatives)).max() > 1e-3
    drawn = sampler(PROMPTS, range(len(PROMPTS)), seed=0, negative_prompts=negatives)
    np.testing.assert_array_equal(drawn, np.round(255 * expected).astype(np.uint8))
    stored = [name for name in sampler.weights if name.startswith("own_prompts") and "text_encoders" in name]
    assert len(stored) == 2 and all("fc1.bias" in name for name in stored), "what differs alone is stored"


def test_a_single_prompt_is_the_first_of_a_list(draw):
    image = draw("a cat", rule=npo(S))
    np.testing.assert_array_equal(image, draw(["a cat"], [0], npo(S), seed=0))
    assert image.shape == (1, 16, 16, 3)


def test_a_set_is_drawn_by_one_program_from_noise_to_bytes(draw):
    keys, table = image_keys(0, range(len(PROMPTS))), tabulate(npo(S), len(draw.solver.timesteps), len(PROMPTS))
    want = to_bytes(draw.draw(PROMPTS, keys, table))
    text_to_image._image_sampler.clear_cache()
    draw.conditioning(PROMPTS, None)  # what encodes prompts is compiled
    compiled = []

    def count(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        pixels = draw.draw_bytes(PROMPTS, keys, table)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    np.testing.assert_array_equal(pixels, want)
    assert len(compiled) == 1
