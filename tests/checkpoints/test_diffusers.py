"""Diffusers folders in and out, and what users see when one is not right."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from flax_pref.checkpoints.diffusers import (
    Pipeline,
    load_pipeline,
    load_text_encoder,
    load_unet,
    load_vae,
    save_pipeline,
)
from flax_pref.checkpoints.modules import fingerprint
from flax_pref.checkpoints.tokenizer import CLIPTokenizer
from flax_pref.checkpoints.weights import save_network, to_stored
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.models.clip import CLIPTextConfig, CLIPTextModel
from flax_pref.models.network import Network
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
        text_encoders=(network(CLIPTextModel, text),),
        tokenizers=(tokenizer,),
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
    parts = [(p.unet, p.vae, *p.text_encoders) for p in (pipeline, loaded)]
    for before, after in zip(*parts, strict=True):
        assert after.config == before.config
        same(after.params, before.params, rtol=0)
    assert loaded.scheduler_config == SCHEDULER
    np.testing.assert_array_equal(loaded.tokenizers[0](["a"]), pipeline.tokenizers[0](["a"]))


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
    save_network(pipeline.text_encoders[0], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("text_model.") for name in tensors)
    tensors["text_model.embeddings.position_ids"] = np.arange(8)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    same(load_text_encoder(tmp_path).params, pipeline.text_encoders[0].params, rtol=0)
    without = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    save_file(without, tmp_path / "model.safetensors")
    same(load_text_encoder(tmp_path).params, pipeline.text_encoders[0].params, rtol=0)


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


SHARDED_LOADING = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from flax_pref.checkpoints.diffusers import load_vae
mesh = Mesh(np.array(jax.devices()), ("fsdp",))
def place(path, shape):
    return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "fsdp" if shape[-1] % 8 == 0 else None))
sharded, whole = load_vae(sys.argv[1], place=place).params, load_vae(sys.argv[1]).params
split = 0
for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
    assert len(a.addressable_shards) == 8
    split += a.addressable_shards[0].data.shape != a.shape
    np.testing.assert_array_equal(a, b)
assert split > 10, split
"""


def test_weights_go_to_the_devices_that_the_sharding_names(vae_folder):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED_LOADING, vae_folder], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]


def test_a_large_network_is_written_in_shards_that_diffusers_and_we_read(pipeline, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    save_network(pipeline.unet, tmp_path / "unet", shard_bytes=20_000)
    names = sorted(path.name for path in (tmp_path / "unet").glob("*.safetensors"))
    assert len(names) > 2
    assert max(path.stat().st_size for path in (tmp_path / "unet").glob("*.safetensors")) < 30_000
    same(load_unet(tmp_path / "unet").params, pipeline.unet.params, rtol=0)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    ours = to_stored(pipeline.unet.params)
    assert theirs.keys() == ours.keys()
    assert all((theirs[name].numpy() == ours[name]).all() for name in ours)


def test_weights_of_torch_are_read_where_there_are_no_others(vae_folder, pipeline):
    torch = pytest.importorskip("torch")
    weights = load_file(vae_folder / WEIGHTS)
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, vae_folder / f"{WEIGHTS[:-12]}.bin")
    safe = fingerprint(vae_folder)
    (vae_folder / WEIGHTS).unlink()
    same(load_vae(vae_folder).params, pipeline.vae.params, rtol=0)
    of_torch = fingerprint(vae_folder)
    torch.save(
        {name: torch.from_numpy(array + 1) for name, array in weights.items()}, vae_folder / f"{WEIGHTS[:-12]}.bin"
    )
    assert len({safe, of_torch, fingerprint(vae_folder)}) == 3


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusion3Pipeline"},
            "'StableDiffusion3Pipeline' is not supported",
        ),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supported"),
        ("unet/config.json", {"cross_attention_dim": 16}, "shape"),
        ("vae/config.json", {"latent_channels": "four"}, "latent_channels='four' is not supported"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ("unet/config.json", {"block_out_channels": [8, 8]}, "down_block_types"),
    ],
)
def test_other_architectures_are_refused_by_file_and_field(part, change, message, pipeline, tmp_path):
    save_pipeline(pipeline, tmp_path / "saved")
    file = tmp_path / "saved" / part
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        load_pipeline(tmp_path / "saved")
    assert str(file.parent) in str(error.value)


def test_an_inpainting_network_is_refused_as_such(pipeline, tmp_path):
    inpainting = network(UNet2DCondition, dataclasses.replace(UNET, in_channels=9))
    save_pipeline(dataclasses.replace(pipeline, unet=inpainting), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"unet/config.json: in_channels=9 .* none for inpainting"):
        load_pipeline(tmp_path / "saved")


def test_parts_that_do_not_belong_together_are_refused(pipeline, tmp_path):
    wide = dataclasses.replace(UNET, cross_attention_dim=12)
    save_pipeline(dataclasses.replace(pipeline, unet=network(UNet2DCondition, wide)), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"unet/config.json: cross_attention_dim=12, but the text encoders give 8"):
        load_pipeline(tmp_path / "saved")


def test_a_vocabulary_loads_with_an_embedding_of_its_size_only(pipeline, tmp_path):
    """Textual inversion adds a token to the tokenizer and a row to the embedding."""
    save_pipeline(pipeline, tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<toy>": 4}))
    with pytest.raises(ValueError, match=r"tokenizer: 5 tokens, 1 of them added, but .* vocab_size=4 rows") as error:
        load_pipeline(tmp_path / "saved")
    assert str(error.value).startswith(str(tmp_path))
    encoder = tmp_path / "saved" / "text_encoder"
    tensors = load_file(encoder / "model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    save_file(tensors | {name: np.concatenate([tensors[name], tensors[name][:1]])}, encoder / "model.safetensors")
    change_config(encoder, vocab_size=5)
    assert 4 in load_pipeline(tmp_path / "saved").tokenizers[0](["a <toy> a"])
    (tmp_path / "saved" / "tokenizer" / "added_tokens.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer: 4 tokens, 0 of them added, but .* vocab_size=5 rows"):
        load_pipeline(tmp_path / "saved")


def damage(rng, folder):
    """One fault of a random kind in a random file of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = files[rng.integers(len(files))]
    content = bytearray(file.read_bytes())
    kind = rng.integers(6)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        file.write_bytes(content[: rng.integers(len(content))])
    elif kind == 2:  # in the header, if it is a weight file
        content[rng.integers(min(len(content), 3000))] ^= 1 << rng.integers(8)
        file.write_bytes(content)
    elif kind == 3:
        file.write_bytes(rng.bytes(rng.integers(1, 200)))
    elif kind == 4 and file.suffix == ".json":
        values = json.loads(content)
        names = sorted(values) or ["x"]
        junk = [None, -1, 0, 3, 2.5, "x", [], [1, 2], {}, True, 10**30]
        values[names[rng.integers(len(names))]] = junk[rng.integers(len(junk))]
        file.write_text(json.dumps(values))
    elif file.suffix == ".safetensors":
        tensors = load_file(file)
        name = sorted(tensors)[rng.integers(len(tensors))]
        tensor = tensors.pop(name)
        match rng.integers(5):
            case 0:
                tensors[name + ".extra"] = tensor
            case 1:
                tensors[name] = np.concatenate([tensor, tensor])
            case 2:
                tensors[name] = tensor.astype(np.int32)
            case 3:
                tensors[name] = np.full_like(tensor, np.nan)
        save_file(tensors, file)
    else:
        file.rename(file.with_suffix(".bin"))
    return file


def test_a_damaged_checkpoint_gives_one_line_that_names_a_file_or_loads(pipeline, tmp_path):
    save_pipeline(pipeline, tmp_path / "whole")
    rng, refused = np.random.default_rng(0), 0
    for i in range(50):
        folder = tmp_path / f"{i}"
        shutil.copytree(tmp_path / "whole", folder)
        damage(rng, folder)
        before = sorted(folder.rglob("*"))
        try:
            loaded = load_pipeline(folder)
            solver_from_config(loaded.scheduler_config, 3)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            message = str(error)
            assert str(folder) in message or message.startswith(("NoiseSchedule:", "scheduler_config:", "solver:"))
            assert "\n" not in message.strip()
        assert sorted(folder.rglob("*")) == before
        shutil.rmtree(folder)
    assert refused > 25
