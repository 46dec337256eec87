"""CLIP with both towers and the scores made of it, against transformers and torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from clip_reference import as_openclip, small_clip
from flax import nnx
from published import FOLDER
from safetensors.torch import load_file, save_file
from torch_reference import nchw, relative_error

from flax_pref.checkpoints.clip_files import load_clip, load_clip_vision
from flax_pref.checkpoints.weights import save_network
from flax_pref.rewards.aesthetic import load_aesthetic_reward, read_head
from flax_pref.rewards.clip import load_clip_reward
from flax_pref.rewards.preprocessing import OPENAI_MEAN, OPENAI_STD

# Two end tokens in the first text; padding that is no end token in the second.
INPUT_IDS = np.array([[97, 5, 6, 98, 98, 98, 98, 98], [97, 3, 4, 5, 6, 7, 98, 0]], np.int32)
IMAGES = np.random.default_rng(0).standard_normal((2, 12, 12, 3)).astype(np.float32)
TOKENIZER = FOLDER / "clip_tokenizer"
HEAD = FOLDER / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth"
needs_tokenizer = pytest.mark.skipif(not TOKENIZER.is_dir(), reason="needs CLIP's vocabulary")
needs_head = pytest.mark.skipif(not HEAD.is_file(), reason="needs the aesthetic head")


@functools.partial(jax.jit, static_argnums=0)
def embed(graphdef, params):
    clip = nnx.merge(graphdef, params)
    return clip.encode_images(IMAGES), clip.encode_texts(INPUT_IDS), jnp.exp(clip.logit_scale[...])


def assert_the_same(network, reference):
    """Embeddings and logits of our network and transformers'."""
    images, texts, scale = embed(network.graphdef, network.params)
    with torch.no_grad():
        theirs = reference(input_ids=torch.from_numpy(INPUT_IDS).long(), pixel_values=nchw(IMAGES))
        vision = reference.visual_projection(reference.vision_model(pixel_values=nchw(IMAGES)).pooler_output)
    assert relative_error(images, vision) < 1e-5
    images, texts = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
    assert relative_error(images, theirs.image_embeds) < 1e-5
    assert relative_error(texts, theirs.text_embeds) < 1e-5
    assert relative_error(scale * images @ texts.T, theirs.logits_per_image) < 1e-5


@pytest.mark.parametrize(
    ("stored", "act"),
    [("safetensors", "gelu"), ("torch", "quick_gelu"), ("shards", "quick_gelu"), ("torch shards", "gelu")],
)
def test_a_folder_of_transformers_gives_its_embeddings_and_logits(stored, act, tmp_path):
    reference = small_clip(act)
    reference.save_pretrained(tmp_path, max_shard_size="1MB" if "shards" in stored else "1GB")
    if "torch" in stored:  # as transformers wrote it before safetensors
        shards = sorted(tmp_path.glob("*.safetensors"))
        for shard in shards:
            name = shard.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
            torch.save(load_file(shard), tmp_path / name)
            shard.unlink()
        for index in tmp_path.glob("*.index.json"):
            text = index.read_text().replace('"model-', '"pytorch_model-').replace(".safetensors", ".bin")
            (tmp_path / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    if "shards" in stored:
        assert len(list(tmp_path.glob("*-of-*"))) > 1
    assert_the_same(load_clip(tmp_path), reference)


def test_a_folder_that_we_write_is_read_by_transformers(tmp_path):
    reference = small_clip("quick_gelu")
    reference.save_pretrained(tmp_path / "theirs")
    network = load_clip(tmp_path / "theirs")
    save_network(network, tmp_path / "ours")
    assert_the_same(network, transformers.CLIPModel.from_pretrained(tmp_path / "ours").eval())


def without_buffers(model):
    return {name: x for name, x in model.state_dict().items() if not name.endswith("position_ids")}


@pytest.mark.parametrize("stored", ["weights.bin", "weights.safetensors", "training.pt", "custom_text.pt", "old.pt"])
def test_an_openclip_file_gives_the_embeddings_of_the_same_weights(stored, tmp_path):
    act = "quick_gelu" if stored == "weights.bin" else "gelu"
    reference = small_clip(act)
    weights = as_openclip(without_buffers(reference), text="text." if stored == "custom_text.pt" else "")
    file = tmp_path / stored
    match stored:
        case "weights.safetensors":
            save_file({name: x.contiguous() for name, x in weights.items()}, file)
        case "training.pt":
            weights = {f"module.{name}": x for name, x in weights.items()}
            torch.save({"epoch": 3, "name": "run", "state_dict": weights, "optimizer": {"state": {0: {}}}}, file)
        case "old.pt":
            weights["attn_mask"] = torch.zeros(8, 8)
            torch.save(weights, file, _use_new_zipfile_serialization=False)
        case _:
            torch.save(weights, file)
    assert_the_same(load_clip(file, hidden_act=act), reference)

    vision = load_clip_vision(file, hidden_act=act)
    assert not any("text" in name for name in vision.params)
    images = nnx.merge(vision.graphdef, vision.params).encode_images(IMAGES)
    with torch.no_grad():
        theirs = reference.visual_projection(reference.vision_model(pixel_values=nchw(IMAGES)).pooler_output)
    assert relative_error(images, theirs) < 1e-5


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """A small CLIP that knows CLIP's whole vocabulary, as transformers has it, and its folder."""
    folder = tmp_path_factory.mktemp("worded")
    text = {"vocab_size": 49408, "hidden_size": 16, "max_position_embeddings": 77}
    reference = small_clip(text=text, vision={"hidden_size": 24})
    reference.save_pretrained(folder)
    return reference, folder


PROMPTS = [
    "",
    "a photo of a cat",
    " ".join(f"word{i} & more," for i in range(60)),
    "  Two\n lines é <|endoftext|> after",
]


@needs_tokenizer
@pytest.mark.parametrize("name", ["clip", "pickscore"])
# Images of 12 pixels are seen as they are, so that this is about the network and the words alone.
def test_scores_of_empty_and_long_prompts_are_those_of_transformers(name, worded):
    reference, folder = worded
    reward = load_clip_reward(name, folder, tokenizer=TOKENIZER)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    pixels = np.random.default_rng(1).integers(0, 256, (len(PROMPTS), 12, 12, 3), np.uint8)
    scores = jax.jit(lambda r, x, p: r.score(r.view(x), p))(
        reward, (pixels / 255).astype(np.float32), reward.prepare(PROMPTS)
    )
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = reference(input_ids=ids, pixel_values=processor(list(pixels), return_tensors="pt").pixel_values)
    cosines = (theirs.image_embeds * theirs.text_embeds).sum(dim=-1)
    expected = reference.logit_scale.exp() * cosines if name == "pickscore" else cosines
    assert scores.dtype == np.float32 and scores.shape == (len(PROMPTS),)
    assert relative_error(scores, expected) < 1e-5


@needs_tokenizer
def test_hpsv2_scores_images_of_any_shape_as_its_authors_do(worded):
    reference, folder = worded
    reward = load_clip_reward("hpsv2", folder, tokenizer=TOKENIZER)
    image = np.random.default_rng(2).random((1, 30, 44, 3)).astype(np.float32)
    scores = reward.score(reward.view(image), reward.prepare(PROMPTS[1:2]))
    resized = torch.nn.functional.interpolate(nchw(image), (8, 12), mode="bicubic", antialias=True)
    black = torch.nn.functional.pad(resized, (0, 0, 2, 2))
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_MEAN, OPENAI_STD))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    ids = tokenizer(PROMPTS[1:2], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = reference(input_ids=ids, pixel_values=(black - mean) / std)
    assert relative_error(scores, (theirs.image_embeds * theirs.text_embeds).sum(dim=-1)) < 1e-5


@needs_head
def test_the_aesthetic_score_is_that_of_its_authors_layers(tmp_path):
    reference = small_clip("quick_gelu", projection_dim=768)
    reference.save_pretrained(tmp_path)
    reward = load_aesthetic_reward(HEAD, tmp_path)
    linear = torch.nn.Linear
    head = [linear(768, 1024), linear(1024, 128), linear(128, 64), linear(64, 16), linear(16, 1)]
    stored = torch.load(HEAD, map_location="cpu")
    for layer, number in zip(head, (0, 2, 4, 6, 7), strict=True):
        layer.load_state_dict({kind: stored[f"layers.{number}.{kind}"] for kind in ("weight", "bias")})
    with torch.no_grad():
        features = reference.visual_projection(reference.vision_model(pixel_values=nchw(IMAGES)).pooler_output)
        features = features / features.norm(dim=-1, keepdim=True)
        expected = torch.nn.Sequential(*head)(features)[:, 0]
    assert relative_error(reward.image_features(IMAGES), features) < 1e-5
    assert relative_error(reward.score(IMAGES, ()), expected) < 1e-5
    kernel, _ = read_head(HEAD)
    assert kernel.shape == (768,)


@pytest.fixture
def in_float64():
    with jax.enable_x64():
        yield


@needs_tokenizer
@needs_head
@pytest.mark.parametrize("name", ["pickscore", "hpsv2.1", "aesthetic"])
def test_gradients_of_scores_are_those_of_finite_differences(name, worded, tmp_path, in_float64):
    if name == "aesthetic":
        small_clip(vision={"hidden_size": 24}, projection_dim=768).save_pretrained(tmp_path)
        reward = load_aesthetic_reward(HEAD, tmp_path, dtype=jnp.float64)
    else:
        reward = load_clip_reward(name, worded[1], tokenizer=TOKENIZER, dtype=jnp.float64)
    prepared = reward.prepare(["a cat", "a dog"])

    @jax.jit
    def scores_and_gradients(images):
        scores, pull_back = jax.vjp(lambda images: reward.score(reward.view(images), prepared), images)
        return scores, pull_back(jnp.ones_like(scores))[0]

    rng = np.random.default_rng(0)
    images, direction = rng.uniform(0.2, 0.8, (2, 12, 12, 3)), rng.standard_normal((2, 12, 12, 3))
    slopes = (scores_and_gradients(images)[1] * direction).sum(axis=(1, 2, 3))
    step = 1e-5
    above, below = (scores_and_gradients(images + sign * step * direction)[0] for sign in (1, -1))
    differences = (above - below) / (2 * step)
    assert slopes.dtype == np.float64
    np.testing.assert_allclose(slopes, differences, rtol=1e-6)
