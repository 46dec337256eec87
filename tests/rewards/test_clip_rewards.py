"""CLIP scores and the aesthetic score: what they see, what they are loaded from, and what is said of wrong files."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from flax_pref.checkpoints import clip_files, hub
from flax_pref.checkpoints.clip_files import load_clip
from flax_pref.checkpoints.tokenizer import CLIPTokenizer
from flax_pref.checkpoints.weights import abstract_network, save_network
from flax_pref.models.clip import CLIPTextConfig
from flax_pref.models.clip_vision import CLIPConfig, CLIPVisionConfig
from flax_pref.models.network import Network
from flax_pref.rewards.aesthetic import load_aesthetic_reward
from flax_pref.rewards.clip import CLIP_SCORES, load_clip_reward
from flax_pref.rewards.preprocessing import OPENAI_MEAN, OPENAI_STD
from flax_pref.rewards.reward import Weighted, load_reward, make_reward

try:
    import torch
except ModuleNotFoundError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")

TOKENS = [*"abcd&;", *(f"{letter}</w>" for letter in "abcd&;'"), "<|startoftext|>", "<|endoftext|>"]
WORDS = CLIPTokenizer({token: i for i, token in enumerate(TOKENS)}, [], model_max_length=77)
END = WORDS.vocab["<|endoftext|>"]
CONFIG = CLIPConfig(
    projection_dim=6,
    text_config=CLIPTextConfig(
        **{"vocab_size": len(TOKENS), "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "max_position_embeddings": 7, "eos_token_id": END, "hidden_act": "gelu"},
    ),
    vision_config=CLIPVisionConfig(
        **{"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 8, "patch_size": 4, "hidden_act": "gelu"},
    ),
)


def random_network(config=CONFIG, seed=0) -> Network:
    network, rng = abstract_network("clip", config), np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32) / 2, network.params)
    return network._replace(params=params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIP with its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("clip") / "model"
    save_network(random_network(), folder)
    WORDS.save(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


IMAGES = np.random.default_rng(1).random((3, 10, 16, 3)).astype(np.float32)
CAPTIONS = ["a b", "", "a d c b a d c b a d"]


@jax.jit
def scored(reward, images, prepared):
    return reward.score(reward.view(images), prepared)


@functools.lru_cache
def reward_of(name, folder):
    return load_clip_reward(name, folder)


@pytest.mark.parametrize("name", CLIP_SCORES)
def test_an_image_scores_the_same_alone_and_among_others(name, folder):
    reward = reward_of(name, folder)
    assert reward.name == name and reward.differentiable
    together = scored(reward, IMAGES, reward.prepare(CAPTIONS))
    alone = [scored(reward, IMAGES[i : i + 1], reward.prepare(CAPTIONS[i : i + 1]))[0] for i in range(3)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert together.dtype == np.float32 and len(set(np.asarray(together).tolist())) == 3


def test_scores_differ_as_their_authors_have_it(folder):
    clip, pick, hps = (reward_of(name, folder) for name in ("clip", "pickscore", "hpsv2"))
    square, prepared = IMAGES[:, :8, :8], clip.prepare(CAPTIONS)
    cosine = scored(clip, square, prepared)
    assert np.abs(cosine).max() <= 1
    np.testing.assert_allclose(scored(pick, square, prepared), np.exp(clip.params["logit_scale"]) * cosine, rtol=1e-5)
    # A square of their size is seen alike; of others one sees the middle and the other all, with black bars.
    np.testing.assert_allclose(scored(hps, square, prepared), cosine, rtol=1e-5)
    black = (0 - np.asarray(OPENAI_MEAN)) / np.asarray(OPENAI_STD)
    assert clip.view(IMAGES).shape == hps.view(IMAGES).shape == (3, 8, 8, 3)
    np.testing.assert_allclose(hps.view(IMAGES)[:, 0], np.broadcast_to(black, (3, 8, 3)), rtol=1e-5)
    assert not np.isclose(clip.view(IMAGES)[:, 0], black, rtol=1e-3).all()


def test_image_features_are_embeddings_of_length_one(folder):
    reward = reward_of("clip", folder)
    features = reward.image_features(reward.view(IMAGES))
    assert features.shape == (3, 6) and features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, rtol=1e-6)


def test_a_long_caption_is_cut_before_its_end_token(folder):
    ids = reward_of("clip", folder).prepare(CAPTIONS)
    assert ids.shape == (3, 7) and ids[2, -1] == END and ids[2, -2] != END
    assert list(ids[1, 1:]) == [END] * 6


CURLY = "\N{RIGHT SINGLE QUOTATION MARK}"


def test_hps_reads_captions_as_openclip_does(folder):
    plain = reward_of("clip", folder).prepare(["a & b '", "a &amp; b", f"a {CURLY}"])
    hps = reward_of("hpsv2.1", folder).prepare([f"a &amp; b {CURLY}", "a &amp;amp; b", f"a {CURLY}"])
    np.testing.assert_array_equal(hps[0], plain[0])
    np.testing.assert_array_equal(hps[1], reward_of("clip", folder).prepare(["a & b"])[0])
    assert (hps[1] != plain[1]).any() and (hps[2] != plain[2]).any()


def test_rewards_of_configs_are_loaded_by_name_and_path(folder):
    total = make_reward([Weighted("pickscore", 2.0, str(folder)), Weighted("hpsv2", 1.0, str(folder))])
    parts = [load_reward(name, str(folder)) for name in ("pickscore", "hpsv2")]
    prepared = parts[0].prepare(CAPTIONS)
    expected = 2 * scored(parts[0], IMAGES, prepared) + scored(parts[1], IMAGES, prepared)
    np.testing.assert_allclose(scored(total, IMAGES, total.prepare(CAPTIONS)), expected, rtol=1e-5)


def test_sixteen_bits_keep_the_scale_of_the_cosine(folder):
    full, half = (load_clip_reward("pickscore", folder, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert half.params["logit_scale"].dtype == np.float32
    assert half.params["visual_projection"]["kernel"].dtype == jnp.bfloat16
    scores = [scored(reward, IMAGES, reward.prepare(CAPTIONS)) for reward in (full, half)]
    assert scores[1].dtype == np.float32
    np.testing.assert_allclose(scores[1], scores[0], atol=0.03 * np.exp(full.params["logit_scale"]))


def test_the_backward_pass_keeps_one_state_of_each_layer():
    def memory(layers):
        vision = dataclasses.replace(CONFIG.vision_config, image_size=64, num_hidden_layers=layers)
        network = abstract_network("clip_vision", dataclasses.replace(CONFIG, vision_config=vision))

        def gradient(params, images):
            return jax.grad(lambda x: nnx.merge(network.graphdef, params).encode_images(x).sum())(images)

        images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
        return jax.jit(gradient).lower(network.params, images).compile().memory_analysis().temp_size_in_bytes

    state = 2 * 257 * 8 * 4  # bytes; without recomputation each layer keeps a dozen
    assert memory(6) - memory(2) < 4 * 2 * state


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_a_config_of_the_hub_is_read_with_what_it_leaves_out():
    values = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 768,
        "logit_scale_init_value": 2.6592,
        "text_config": {"architectures": None, "hidden_size": 3, "eos_token_id": 2, "model_type": "clip_text_model"},
        "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12, "projection_dim": 768, "eos_token_id": 2},
        "vision_config": {"hidden_size": 1024, "num_attention_heads": 16, "patch_size": 14, "torch_dtype": None},
        "vision_config_dict": None,
    }
    config = CLIPConfig.from_dict(values)
    assert config.text_config == CLIPTextConfig(
        hidden_size=768, num_attention_heads=12, projection_dim=768, eos_token_id=2
    )
    assert config.vision_config == CLIPVisionConfig(hidden_size=1024, num_attention_heads=16, patch_size=14)
    assert config.vision_config.num_positions == 257
    again = CLIPConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.vision_config == config.vision_config and again.projection_dim == 768


def changed(**weights):
    """A file of weights, some of them replaced and those that are None left out."""

    def change(folder):
        file = folder / "model.safetensors"
        stored = load_file(file) | {name.replace("__", "."): value for name, value in weights.items()}
        save_file({name: value for name, value in stored.items() if value is not None}, file)

    return change


def with_config(**fields):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


WRONG_FOLDERS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "no weights; expected"),
    "a cut file": (cut, ValueError, "not a complete safetensors file"),
    "a weight missing": (changed(logit_scale=None), ValueError, r"no weight 'logit_scale' \(1 weight missing\)"),
    "a weight too many": (changed(extra=np.zeros(2)), ValueError, r"weight 'extra' \(1 weight too many\)"),
    "a weight of another shape": (
        changed(visual_projection__weight=np.zeros((6, 9), np.float32)),
        ValueError,
        r"'visual_projection.weight' has shape \[6, 9\], expected \[6, 8\]",
    ),
    "a weight that is not finite": (
        changed(vision_model__embeddings__class_embedding=np.full(8, np.nan, np.float32)),
        ValueError,
        "class_embedding' holds numbers that are not finite",
    ),
    "another model": (with_config(model_type="siglip"), ValueError, "model_type='siglip' is not supported"),
    "an unknown activation": (
        with_config(vision_config={"hidden_act": "relu"}),
        ValueError,
        "hidden_act='relu' is not supported",
    ),
    "no tokenizer": (lambda folder: (folder / "vocab.json").unlink(), FileNotFoundError, "no tokenizer.*tokenizer="),
    "another tokenizer": (
        lambda folder: (folder / "vocab.json").write_text(
            json.dumps(WORDS.vocab | {f"x{i}": len(WORDS.vocab) + i for i in range(9)})
        ),
        ValueError,
        "the file is cut or belongs to another vocabulary",
    ),
}


@pytest.mark.parametrize("name", WRONG_FOLDERS)
def test_a_wrong_folder_says_so_in_one_line(name, copy, no_network):
    change, kind, message = WRONG_FOLDERS[name]
    change(copy)
    with pytest.raises(kind, match=message) as error:
        load_clip_reward("pickscore", copy)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


def openclip_weights():
    """Names and shapes of an OpenCLIP file with one layer in each tower."""
    shapes = {
        **{"visual.class_embedding": (384,), "visual.positional_embedding": (5, 384), "visual.proj": (384, 6)},
        **{"visual.conv1.weight": (384, 3, 4, 4), "token_embedding.weight": (len(TOKENS), 64)},
        **{"positional_embedding": (7, 64), "text_projection": (64, 6), "logit_scale": ()},
    }
    for tower, width in (("visual.", 384), ("", 64)):
        block = f"{tower}transformer.resblocks.0"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        for name, out, into in (("attn.out_proj", width, width), ("mlp.c_fc", 12, width), ("mlp.c_proj", width, 12)):
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        for norm in (
            f"{block}.ln_1",
            f"{block}.ln_2",
            *(["visual.ln_pre", "visual.ln_post"] if tower else ["ln_final"]),
        ):
            shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    return {name: torch.full(shape, 0.1) for name, shape in shapes.items()}


WRONG_FILES = {
    "a weight missing": (
        lambda w: w.pop("visual.transformer.resblocks.0.attn.in_proj_weight"),
        r"no weight 'vision_model.encoder.layers.0.self_attn.k_proj.weight' \(3 weights missing\)",
    ),
    "a weight too many": (lambda w: w.update(extra=torch.zeros(2)), r"weight 'extra' \(1 weight too many\)"),
    "a weight of another shape": (
        lambda w: w.update({"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(9)}),
        r"weight 'transformer.resblocks.0.attn.in_proj_bias\[q\]' has shape \[3\], expected \[64\]",
    ),
    "a packed weight of no three parts": (
        lambda w: w.update({"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(8)}),
        r"in_proj_bias\[q\]' cannot be read",
    ),
    "a weight that is not finite": (lambda w: w["text_projection"].fill_(torch.inf), "'text_projection' holds numbers"),
    "another network": (lambda w: w.pop("visual.positional_embedding"), "no weight 'visual.positional_embedding'"),
    "a width that no published network has": (
        lambda w: w.update({"visual.conv1.weight": torch.zeros(100, 3, 4, 4)}),
        "width 100, whose attention heads",
    ),
    "no square": (lambda w: w.update({"visual.positional_embedding": torch.zeros(4, 384)}), "3 positions"),
    "no weights": (lambda w: w.clear(), "no weight 'visual.conv1.weight'"),
    "no tensors": (lambda w: w.update(epoch=3), "holds other than weights by name"),
}


@needs_torch
@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_openclip_file_says_so_in_one_line(name, tmp_path):
    weights = openclip_weights()
    torch.save(weights, tmp_path / "right.pt")
    assert load_clip(tmp_path / "right.pt").config.vision_config.num_attention_heads == 6
    change, message = WRONG_FILES[name]
    change(weights)
    file = tmp_path / "wrong.pt"
    torch.save({"state_dict": weights}, file)
    with pytest.raises(ValueError, match=message) as error:
        load_clip(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@needs_torch
def test_an_openclip_file_takes_a_tokenizer_from_elsewhere(folder, tmp_path, no_network):
    torch.save(openclip_weights(), tmp_path / "hps.pt")
    reward = load_clip_reward("hpsv2", tmp_path / "hps.pt", tokenizer=folder)
    assert reward.image_size == 8
    with pytest.raises(FileNotFoundError, match=r"hps\.pt: no tokenizer beside it .*pass tokenizer=FOLDER"):
        load_clip_reward("hpsv2", tmp_path / "hps.pt")


@pytest.mark.parametrize("path", ["no/such/folder", "missing.pt", "owner/name"])
def test_a_path_that_is_nowhere_says_so(path, no_network):
    with pytest.raises(FileNotFoundError, match=re.escape(path)) as error:
        load_clip_reward("clip", path)
    assert "\n" not in str(error.value)


@needs_torch
def test_what_is_published_is_asked_of_the_hub(folder, monkeypatch, tmp_path):
    torch.save(openclip_weights(), tmp_path / "hps.pt")
    asked = []

    def snapshot(name, allow_patterns, **_):
        asked.append((name, any(pattern.endswith(".bin") for pattern in allow_patterns)))
        return folder

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *names: asked.append(names) or tmp_path / "hps.pt")
    for name in CLIP_SCORES:
        load_clip_reward(name, tokenizer=folder)
    assert asked == [
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", False),
        ("yuvalkirstain/PickScore_v1", False),
        ("xswu/HPSv2", "HPS_v2_compressed.pt"),
        ("xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    ]


def test_torch_files_of_the_hub_are_asked_for_only_where_there_is_no_other(monkeypatch, tmp_path):
    asked = []

    def snapshot(name, allow_patterns, **_):
        asked.append([pattern for pattern in allow_patterns if pattern.endswith(".bin")])
        return tmp_path

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    clip_files.find_clip("owner/name")
    assert asked == [[], ["pytorch_model*.bin"]]


def test_an_unknown_score_is_named():
    with pytest.raises(ValueError, match=r"no CLIP score 'hpsv3'; expected one of clip, pickscore, hpsv2, hpsv2\.1"):
        load_clip_reward("hpsv3", "x")


# ----------------------------------------------------------------------------------------------------------------------
# The aesthetic score


def head(width=6):
    sizes = {0: (width, 5), 2: (5, 4), 4: (4, 3), 6: (3, 2), 7: (2, 1)}
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.{number}.{kind}": torch.randn(shape, generator=generator)
        for number, (into, out) in sizes.items()
        for kind, shape in (("weight", (out, into)), ("bias", (out,)))
    }


@needs_torch
def test_the_aesthetic_score_does_not_read_captions_and_loads_no_text_encoder(folder, tmp_path):
    torch.save(head(), tmp_path / "head.pth")
    reward = load_reward("aesthetic", str(tmp_path / "head.pth"), clip=str(folder))
    assert reward.prepare(CAPTIONS) == () and not any("text" in name for name in reward.params)
    scores = scored(reward, IMAGES, ())
    features = np.asarray(reward.image_features(reward.view(IMAGES)), np.float64)
    for number in (0, 2, 4, 6, 7):
        weight, bias = (head()[f"layers.{number}.{kind}"].double().numpy() for kind in ("weight", "bias"))
        features = features @ weight.T + bias
    assert scores.shape == (3,) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, features[:, 0], rtol=1e-5)


WRONG_HEADS = {
    "a layer missing": (lambda h: h.pop("layers.4.weight"), "expected weight and bias of layers.0"),
    "other layers": (lambda h: h.update({"layers.2.weight": torch.zeros(4, 9)}), r"layers.0 has a weight of shape"),
    "not finite": (lambda h: h["layers.6.bias"].fill_(torch.nan), "layers.6 holds numbers that are not finite"),
    "another CLIP": (lambda h: h.update(head(width=9)), "takes embeddings of 9 numbers"),
    "no tensors": (lambda h: h.update({"layers.0.bias": 3}), "holds other than weights by name"),
}


@needs_torch
@pytest.mark.parametrize("name", WRONG_HEADS)
def test_a_wrong_head_says_so_in_one_line(name, folder, tmp_path):
    change, message = WRONG_HEADS[name]
    weights = head()
    change(weights)
    torch.save(weights, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=message) as error:
        load_aesthetic_reward(tmp_path / "head.pth", folder)
    assert "head.pth" in str(error.value) and "\n" not in str(error.value)


def test_a_head_that_is_nowhere_says_where_it_is_published():
    with pytest.raises(FileNotFoundError, match=r"sac\+logos\+ava1-l14-linearMSE\.pth from"):
        load_reward("aesthetic")
