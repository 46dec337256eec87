"""ImageReward from files as its authors write them, against a transcription of BLIP into torch functions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from image_reward_reference import image_states, random_weights, scores, text_states
from safetensors.torch import save_file
from torch_reference import relative_error
from transformers import BlipConfig, BlipTextModel, BlipVisionModel

from flax_pref.checkpoints.blip_files import load_image_reward_model
from flax_pref.models.blip import ImageRewardConfig
from flax_pref.rewards.image_reward import load_image_reward
from flax_pref.rewards.preprocessing import OPENAI_MEAN, OPENAI_STD

SMALL = ImageRewardConfig(
    image_size=16,
    patch_size=4,
    vision_width=128,
    vision_mlp_width=256,
    vision_layers=2,
    vocab_size=60,
    max_position_embeddings=40,
    text_width=64,
    text_mlp_width=192,
    text_layers=2,
)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "painting", "of", "an", "ocean", "clouds", "##y", ","]
CAPTIONS = ["a painting of an ocean", "", "cloudsy, " * 30]


@pytest.fixture(scope="module")
def weights():
    return random_weights(SMALL)


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    """As the file is published: with the projections that BLIP was trained with, and a buffer."""
    folder = tmp_path_factory.mktemp("image-reward")
    surplus = {name: torch.ones(3, 3) for name in ("blip.vision_proj.weight", "blip.text_proj.bias")}
    surplus["blip.text_encoder.embeddings.position_ids"] = torch.arange(SMALL.max_position_embeddings)[None]
    torch.save(weights | surplus, folder / "ImageReward.pt")
    save_file(weights, folder / "weights.safetensors")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture(scope="module")
def images():
    """Of the network's size, so that nothing is resized, and nothing rounded."""
    return np.random.default_rng(0).random((len(CAPTIONS), SMALL.image_size, SMALL.image_size, 3), np.float32)


def theirs(weights, images, ids, mask):
    """Scores `[B]` of images `[B, H, W, 3]` in [0, 1] of the network's size, in the precision of the images."""
    mean, std = (torch.tensor(values, dtype=images.dtype) for values in (OPENAI_MEAN, OPENAI_STD))
    return scores(weights, ((images - mean) / std).permute(0, 3, 1, 2), ids, mask)


def tokens(reward, captions=CAPTIONS):
    ids, mask = reward.prepare(captions)
    return torch.from_numpy(ids).long(), torch.from_numpy(mask)


def test_the_transcription_is_blip_as_transformers_has_it(weights):
    """Otherwise the other tests would compare one misreading with another."""
    config = BlipConfig(
        vision_config={
            "hidden_size": SMALL.vision_width,
            "intermediate_size": SMALL.vision_mlp_width,
            "num_hidden_layers": SMALL.vision_layers,
            "num_attention_heads": SMALL.vision_width // 64,
            "image_size": SMALL.image_size,
            "patch_size": SMALL.patch_size,
            "layer_norm_eps": 1e-6,
        },
        text_config={
            "vocab_size": SMALL.vocab_size,
            "hidden_size": SMALL.text_width,
            "encoder_hidden_size": SMALL.vision_width,
            "intermediate_size": SMALL.text_mlp_width,
            "num_hidden_layers": SMALL.text_layers,
            "num_attention_heads": SMALL.text_width // 64,
            "max_position_embeddings": SMALL.max_position_embeddings,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 0,
        },
    )
    renamed = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding",
        "blocks": "encoder.layers",
        "attn.qkv": "self_attn.qkv",
        "attn.proj": "self_attn.projection",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
    }
    vision, text = (
        BlipVisionModel(config.vision_config).eval(),
        BlipTextModel(config.text_config, add_pooling_layer=False).eval(),
    )
    for model, prefix in ((vision, "blip.visual_encoder."), (text, "blip.text_encoder.")):
        state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if model is vision:
            for old, new in renamed.items():
                state = {name.replace(old, new): value for name, value in state.items()}
            state = {f"post_layer{name}" if name.startswith("norm.") else name: value for name, value in state.items()}
        problems = model.load_state_dict(state, strict=False)
        assert not problems.unexpected_keys and set(problems.missing_keys) <= {"embeddings.position_ids"}
    pixels = torch.randn(2, 3, SMALL.image_size, SMALL.image_size, generator=torch.Generator().manual_seed(1))
    ids, mask = torch.tensor([[2, 5, 6, 3, 0], [2, 7, 9, 8, 3]]), torch.tensor([[1, 1, 1, 1, 0], [1] * 5])
    with torch.no_grad():
        seen = vision(pixels).last_hidden_state
        assert relative_error(image_states(weights, pixels), seen) < 1e-5
        expected = text(ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        # What padding itself attends to matters to no one.
        assert relative_error(text_states(weights, ids, mask, seen)[mask > 0], expected[mask > 0]) < 1e-5


@pytest.mark.parametrize("name", ["ImageReward.pt", "weights.safetensors"])
def test_scores_are_those_of_the_transcription(weights, folder, images, name):
    reward = load_image_reward(str(folder / name))
    assert reward.name == "imagereward" and reward.differentiable
    score = jax.jit(lambda reward, images, prepared: reward.score(reward.view(images), prepared))
    ours = score(reward, images, reward.prepare(CAPTIONS))
    with torch.no_grad():
        expected = theirs(weights, torch.from_numpy(images).double(), *tokens(reward))
    assert ours.dtype == jnp.float32 and expected.std() > 0.1
    assert relative_error(ours, expected) < 1e-5


def test_gradients_of_the_image_are_those_of_finite_differences_in_float64(weights, folder, images):
    reward = load_image_reward(str(folder))
    prepared = reward.prepare(CAPTIONS)
    gradient = jax.jit(jax.grad(lambda images: reward.score(reward.view(images), prepared).sum()))(images)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for direction in rng.standard_normal((4, *images.shape)):
            ahead, behind = (
                theirs(weights, torch.from_numpy(images + step * direction), *tokens(reward)).sum()
                for step in (1e-5, -1e-5)
            )
            numeric = float(ahead - behind) / 2e-5
            size = np.linalg.norm(gradient) * np.linalg.norm(direction) / math.sqrt(direction.size)
            assert abs(np.vdot(gradient, direction) - numeric) < 1e-5 * size


def test_a_score_does_not_depend_on_the_others_nor_on_what_padding_holds(folder, images):
    reward = load_image_reward(str(folder))
    score = jax.jit(lambda images, prepared: reward.score(reward.view(images), prepared))
    ids, mask = reward.prepare(CAPTIONS)
    together = score(images, (ids, mask))
    alone = [score(images[i : i + 1], reward.prepare(CAPTIONS[i : i + 1])) for i in range(len(CAPTIONS))]
    assert relative_error(np.concatenate(alone), together) < 1e-5
    np.testing.assert_array_equal(score(images, (np.where(mask, ids, 7), mask)), together)
    # The second caption is empty, the third too long.
    assert mask.sum(axis=1).tolist() == [7, 2, 35]


def test_sixteen_bits_keep_the_score_to_two_digits(folder, images):
    full, half = (load_image_reward(str(folder), dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    score = jax.jit(lambda reward, images, prepared: reward.score(reward.view(images), prepared))
    scores = [score(reward, images, reward.prepare(CAPTIONS)) for reward in (full, half)]
    assert scores[1].dtype == jnp.float32
    assert relative_error(*scores) < 0.05
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params["visual_encoder"])} == {jnp.dtype(jnp.bfloat16)}


def test_a_vocabulary_that_is_larger_than_the_networks_is_refused(folder, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, *(f"word{i}" for i in range(60))]))
    with pytest.raises(ValueError, match=r"75 tokens, of which BLIP adds two, but .* knows 60; expected vocab\.txt"):
        load_image_reward(str(folder), tokenizer=str(tmp_path))


LAYER = "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({LAYER: None}, r"no weight 'text_encoder\.layers\.1\.crossattention\.key\.weight' \(1 weight missing\)"),
        (
            {"blip.visual_encoder.blocks.2.norm1.bias": torch.ones(128)},
            r"no weight .*blocks\.2\.attn\.proj\.bias' \(11 weights missing\)",
        ),
        (
            {"blip.text_encoder.pooler.weight": torch.ones(2)},
            r"weight 'blip\.text_encoder\.pooler\.weight' \(1 weight too many\)",
        ),
        ({LAYER: torch.ones(64, 64)}, rf"weight '{LAYER}' has shape \[64, 64\], expected \[64, 128\]"),
        ({LAYER: torch.full((64, 128), torch.nan)}, rf"weight '{LAYER}' holds numbers that are not finite"),
        ({LAYER: torch.ones(64, 128, dtype=torch.int8)}, rf"weight '{LAYER}' is stored as int8"),
        ({"blip.visual_encoder.pos_embed": None}, r"no weight 'blip\.visual_encoder\.pos_embed' with 3 dimensions"),
        (
            {"blip.visual_encoder.pos_embed": torch.ones(1, 12, 128)},
            r"pos_embed' has shape \[1, 12, 128\], expected",
        ),
        ({"blip.visual_encoder.patch_embed.proj.weight": torch.ones(96, 3, 4, 4)}, "vision_width=96 is not a multiple"),
        (
            {"blip.visual_encoder.patch_embed.proj.weight": torch.ones(128, 3, 4, 0)},
            "expected the weights of ImageReward",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_file_that_is_not_imagereward_is_refused_in_one_line(weights, tmp_path, kind, change, message):
    file = tmp_path / f"weights.{kind}"
    changed = {name: value for name, value in (weights | change).items() if value is not None}
    (torch.save if kind == "pt" else save_file)(changed, file)
    with pytest.raises(ValueError, match=message) as error:
        load_image_reward_model(file)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
