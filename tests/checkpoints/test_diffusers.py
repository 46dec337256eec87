"""Diffusers folders in and out, and what users see when one is not right."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from flax_pref.checkpoints.diffusers import (
    Network,
    Pipeline,
    load_pipeline,
    load_text_encoder,
    load_vae,
    save_network,
    save_pipeline,
)
from flax_pref.checkpoints.tokenizer import CLIPTokenizer
from flax_pref.models.clip import CLIPTextConfig, CLIPTextModel
from flax_pref.models.unet import UNet2DCondition, UNetConfig
from flax_pref.models.vae import AutoencoderKL, VAEConfig

UNET = UNetConfig(
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    cross_attention_dim=8,
    attention_head_dim=2,
    norm_num_groups=4,
)
VAE = VAEConfig(block_out_channels=(8,), norm_num_groups=4)
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def network(module, config):
    graphdef, state = nnx.split(module(config, rngs=nnx.Rngs(0)))
    return Network(config, graphdef, nnx.to_pure_dict(state))


@pytest.fixture(scope="module")
def pipeline():
    tokens = ["a", "a</w>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], 8)
    text = CLIPTextConfig(
        vocab_size=4,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=2,
        eos_token_id=3,
    )
    return Pipeline(
        unet=network(UNet2DCondition, UNET),
        vae=network(AutoencoderKL, VAE),
        text_encoder=network(CLIPTextModel, text),
        tokenizer=tokenizer,
        scheduler_config=SCHEDULER,
    )


@pytest.fixture
def vae_folder(pipeline, tmp_path):
    save_network(pipeline.vae, tmp_path / "vae")
    return tmp_path / "vae"


WEIGHTS = "diffusion_pytorch_model.safetensors"


def same(ours, theirs, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


def test_a_pipeline_comes_back_as_it_was_saved(pipeline, tmp_path):
    save_pipeline(pipeline, tmp_path / "saved")
    loaded = load_pipeline(tmp_path / "saved")
    for part in ("unet", "vae", "text_encoder"):
        before, after = getattr(pipeline, part), getattr(loaded, part)
        assert after.config == before.config
        same(after.params, before.params, rtol=0)
    assert loaded.scheduler_config == SCHEDULER
    np.testing.assert_array_equal(loaded.tokenizer(["a"]), pipeline.tokenizer(["a"]))


def test_half_precision_weights_load_into_the_dtype_that_is_asked_for(pipeline, tmp_path):
    save_pipeline(pipeline, tmp_path / "half", dtype=jnp.float16)
    stored = load_file(tmp_path / "half" / "unet" / WEIGHTS)
    assert {array.dtype for array in stored.values()} == {np.dtype(np.float16)}
    loaded = load_pipeline(tmp_path / "half", jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.unet.params)} == {np.dtype(jnp.bfloat16)}
    same(load_pipeline(tmp_path / "half").unet.params, pipeline.unet.params, atol=1e-3)


def test_sharded_fp16_and_old_attention_names_load(pipeline, vae_folder):
    tensors = load_file(vae_folder / WEIGHTS)
    (vae_folder / WEIGHTS).unlink()
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        for new, former in old.items():
            name = name.replace(new, former)
        shards[sorted(shards)[i % 2]][name] = tensor
    for file, part in shards.items():
        save_file(part, vae_folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (vae_folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    same(load_vae(vae_folder).params, pipeline.vae.params, rtol=0)


def test_text_encoder_files_of_the_hub_load(pipeline, tmp_path):
    save_network(pipeline.text_encoder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("text_model.") for name in tensors)
    tensors["text_model.embeddings.position_ids"] = np.arange(8)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    same(load_text_encoder(tmp_path).params, pipeline.text_encoder.params, rtol=0)
    without = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    save_file(without, tmp_path / "model.safetensors")
    same(load_text_encoder(tmp_path).params, pipeline.text_encoder.params, rtol=0)


def change_config(folder, **change):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "relu"}, "act_fn='relu' is not supported; supported: 'silu'"),
        ({"new_feature": 3}, "unknown field new_feature=3"),
        ({"latent_channels": 5}, r"shape \[8, 8, 1, 1\], expected \[10, 10, 1, 1\]|has shape"),
        ({"layers_per_block": 2}, r"no weight '.*' \(\d+ weights missing\)"),
        ({"mid_block_add_attention": False}, r"too many\) has no place"),
    ],
)
def test_a_config_that_does_not_fit_is_named_with_its_file(change, message, vae_folder):
    change_config(vae_folder, **change)
    with pytest.raises(ValueError, match=message) as error:
        load_vae(vae_folder)
    assert str(vae_folder) in str(error.value)


def test_missing_and_damaged_files_are_named(vae_folder):
    content = (vae_folder / WEIGHTS).read_bytes()
    (vae_folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_vae(vae_folder)
    (vae_folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights; expected diffusion_pytorch_model\.safetensors"):
        load_vae(vae_folder)
    (vae_folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load_vae(vae_folder)


def test_a_folder_that_holds_something_is_not_overwritten(pipeline, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        save_pipeline(pipeline, tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_nothing_is_left_of_a_save_that_fails(pipeline, tmp_path):
    broken = dataclasses.replace(pipeline, scheduler_config={"_class_name": "DDIMScheduler", "beta_start": object()})
    with pytest.raises(TypeError):
        save_pipeline(broken, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
