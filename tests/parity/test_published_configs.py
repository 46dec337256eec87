"""The config files that Stable Diffusion 1.5 and SDXL are published with."""

import csv
import json

import jax
import numpy as np
import pytest
from flax import nnx
from published import published
from transformers import CLIPTokenizer

from flax_pref.checkpoints.tokenizer import load_tokenizer
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.models.clip import CLIPTextConfig, CLIPTextModel
from flax_pref.models.presets import FAMILIES
from flax_pref.models.unet import UNet2DCondition, UNetConfig
from flax_pref.models.vae import AutoencoderKL, VAEConfig


def read(path):
    folder = published(f"model_configs/{path}")
    return json.loads(next(folder.glob("*config.json")).read_text())


@pytest.mark.parametrize(
    ("path", "kind", "module", "parameters"),
    [
        ("sd15/unet", UNetConfig, UNet2DCondition, 859_520_964),
        pytest.param("sdxl/unet", UNetConfig, UNet2DCondition, 2_567_463_684, marks=pytest.mark.long),
        ("sd15/vae", VAEConfig, AutoencoderKL, 83_653_863),
        ("sdxl/vae", VAEConfig, AutoencoderKL, 83_653_863),
        ("sd15/text_encoder", CLIPTextConfig, CLIPTextModel, 123_060_480),
        ("sdxl/text_encoder", CLIPTextConfig, CLIPTextModel, 123_060_480),
        ("sdxl/text_encoder_2", CLIPTextConfig, CLIPTextModel, 694_659_840),
    ],
)
def test_a_published_config_builds_the_network_of_the_published_size(path, kind, module, parameters):
    values = read(path)
    config = kind.from_dict(values)
    abstract = nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(abstract)))
    assert sum(leaf.size for leaf in leaves) == parameters
    assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_presets_are_the_published_configs(family):
    preset = FAMILIES[family]
    assert UNetConfig.from_dict(read(f"{family}/unet")) == preset.unet
    assert VAEConfig.from_dict(read(f"{family}/vae")) == preset.vae
    for suffix, encoder in zip(("", "_2"), preset.text_encoders, strict=False):
        assert CLIPTextConfig.from_dict(read(f"{family}/text_encoder{suffix}")) == encoder
    published_solver = solver_from_config(read(f"{family}/scheduler"), 7)
    for ours, theirs in zip(
        *map(jax.tree.leaves, (solver_from_config(preset.scheduler_config, 7), published_solver)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("path", ["sd15/scheduler", "sdxl/scheduler"])
def test_a_published_scheduler_gives_the_schedule_of_stable_diffusion(path):
    schedule = NoiseSchedule.from_dict(read(path))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-12)


TEXTS = [
    "",
    "a photo of an astronaut riding a horse on mars",
    "It's 2024: 3 DOGS, it\u2019ll café\u2026 naïve \u2013 日本語 🎨!!",
    "  double  spaces\tand\nlines ",
    "<|startoftext|> inside <|endoftext|>",
    "word " * 100,
]


def test_partiprompts_have_the_ids_of_transformers_and_none_is_cut_unnoticed():
    folder = published("clip_tokenizer")
    with open(next(published("prompts").glob("*.tsv")), encoding="utf-8", newline="") as file:
        prompts = [row["Prompt"] for row in csv.DictReader(file, delimiter="\t")]
    assert len(prompts) > 1600
    theirs = CLIPTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    padded = theirs(prompts, padding="max_length", truncation=True, max_length=77)
    np.testing.assert_array_equal(tokenizer(prompts), np.array(padded["input_ids"]))
    long = [prompt + " and so on" * 30 for prompt in prompts[:50]]
    for prompt, cut in zip(long, tokenizer.cut(long), strict=True):
        seen = prompt.removesuffix(cut)
        assert len(theirs(seen)["input_ids"]) == 77
        assert theirs(seen)["input_ids"][:-1] == theirs(prompt, truncation=True, max_length=77)["input_ids"][:-1]
    assert not any(tokenizer.cut(["short", ""]))


def test_clip_s_vocabulary_gives_the_ids_of_transformers():
    folder = published("clip_tokenizer")
    theirs = CLIPTokenizer.from_pretrained(folder)(TEXTS, padding="max_length", truncation=True, max_length=77)
    np.testing.assert_array_equal(load_tokenizer(folder)(TEXTS), np.array(theirs["input_ids"]))
