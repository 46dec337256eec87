"""Networks of image features from files as users have them, against transformers and transcriptions into torch."""

import jax
import numpy as np
import pytest
import torch
from clip_reference import small_clip
from dinov2_reference import authors_weights, class_token, positions
from inception_reference import features as inception_features
from inception_reference import graph_weights, random_weights, resized, save_script
from lpips_reference import distances, whole
from lpips_reference import random_weights as random_weights_of_lpips
from PIL import Image
from safetensors.torch import save_file
from torch_reference import relative_error
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from flax_pref.checkpoints.dinov2_files import resampling
from flax_pref.rewards.features import load_distance, load_features
from flax_pref.rewards.preprocessing import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 40, 52, 3), np.uint8)


def seen(network, images=IMAGES):
    """Features of images of 8 bits."""
    see = jax.jit(lambda network, images: network.image_features(network.view(images)))
    return np.asarray(see(network, images.astype(np.float32) / 255))


def of_view(network, view):
    """Features of images `[B, 3, S, S]` that are resized and normalised already."""
    view = np.asarray(view.permute(0, 2, 3, 1), np.float32)
    return np.asarray(jax.jit(lambda network, view: network.image_features(view))(network, view))


def as_torch(images):
    """`[B, H, W, 3]` as networks in torch take them, in float64."""
    return torch.from_numpy(np.asarray(images, np.float64).transpose(0, 3, 1, 2).copy())


# ----------------------------------------------------------------------------------------------------------------------
# Inception


@pytest.fixture(scope="module")
def inception():
    return random_weights(unit=1)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_inception_is_the_transcription_behind_tensorflows_resizing(kind, inception, tmp_path):
    file = tmp_path / f"weights.{kind}"
    (torch.save if kind == "pth" else save_file)(inception, file)
    ours = seen(load_features("inception", str(file)))
    theirs = inception_features(inception, (resized(as_torch(IMAGES)) - 128) / 128)
    assert ours.dtype == np.float32 and ours.shape == (2, 128) and theirs.std() > 0.1
    assert relative_error(ours, theirs) < 1e-5 and relative_error(ours[0] - ours[1], theirs[0] - theirs[1]) < 1e-3


def test_inception_from_clean_fids_program_sees_what_pillow_resizes_in_floating_point(inception, tmp_path):
    without_scale = {
        name: torch.ones_like(value) if name.endswith(".bn.weight") else value for name, value in inception.items()
    }
    save_script(graph_weights(inception), tmp_path / "inception-2015-12-05.pt")
    ours = seen(load_features("inception-clean", str(tmp_path / "inception-2015-12-05.pt")))
    levels = [
        np.stack(
            [np.asarray(Image.fromarray(image[..., c].astype(np.float32)).resize((299, 299), 3)) for c in range(3)]
        )
        for image in IMAGES
    ]
    theirs = inception_features(without_scale, (torch.from_numpy(np.stack(levels)).double().clip(0, 255) - 128) / 128)
    assert relative_error(ours, theirs) < 1e-5 and relative_error(ours[0] - ours[1], theirs[0] - theirs[1]) < 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# DINOv2


def dinov2_view(images, shortest=256, size=224):
    """The authors' transform, by Pillow: `[B, H, W, 3]` of 8 bits to normalised `[B, 3, 224, 224]`, in float64."""
    found = []
    for image in images:
        height, width = image.shape[:2]
        height, width = shortest * height // min(height, width), shortest * width // min(height, width)
        image = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        found.append(np.asarray(image.crop((left, top, left + size, top + size))) / 255)
    return as_torch((np.stack(found) - IMAGENET_MEAN) / IMAGENET_STD)


@pytest.mark.parametrize("more", [{}, {"gated": True}, {"registers": 4}, {"grid": 16}])
def test_dinov2_of_its_authors_is_the_transcription(more, tmp_path):
    weights = authors_weights(**{"grid": 37, **more})
    torch.save(weights, tmp_path / "dinov2_vits14_pretrain.pth")
    view = dinov2_view(IMAGES)
    theirs = class_token(weights, view)
    assert theirs.std() > 0.1 and abs(theirs[0] - theirs[1]).max() > 1e-3
    ours = of_view(load_features("dinov2", str(tmp_path / "dinov2_vits14_pretrain.pth")), view)
    assert relative_error(ours, theirs) < 1e-5 and relative_error(ours[0] - ours[1], theirs[0] - theirs[1]) < 1e-3


def test_dinov2_sees_images_as_pillow_resizes_them(tmp_path):
    save_file(authors_weights(layers=1), tmp_path / "weights.safetensors")
    network = load_features("dinov2", str(tmp_path / "weights.safetensors"))
    view = dinov2_view(IMAGES).permute(0, 2, 3, 1).numpy()
    ours = np.asarray(jax.jit(lambda network, images: network.view(images))(network, IMAGES.astype(np.float32) / 255))
    # A few values halfway between two levels fall to the other side, see `rewards.preprocessing.resize`.
    assert np.abs(ours - view).max() < 1.01 / 255 / min(IMAGENET_STD) and (np.abs(ours - view) > 1e-5).mean() < 1e-4


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_of_transformers_is_that_of_transformers(gated, registers, tmp_path):
    kinds = (Dinov2WithRegistersConfig, Dinov2WithRegistersModel) if registers else (Dinov2Config, Dinov2Model)
    config = kinds[0](
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "patch_size": 14},
        **{"image_size": 42, "use_swiglu_ffn": gated, "layerscale_value": 0.7},
        **({"num_register_tokens": registers} if registers else {}),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kinds[1](config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    view = dinov2_view(IMAGES)
    with torch.no_grad():
        theirs = model.double()(view).pooler_output
    assert relative_error(of_view(load_features("dinov2", str(tmp_path)), view), theirs) < 1e-5


def test_positions_are_resampled_as_torch_does_it():
    weights = authors_weights(grid=37)
    for more in ({}, {"register_tokens": torch.zeros(1, 1, 128)}):
        theirs = positions({"pos_embed": weights["pos_embed"].double()} | more, 16)
        axis = resampling(37, 16, offset=0 if more else 0.1, antialias=bool(more))
        square = weights["pos_embed"][0, 1:].double().numpy().reshape(37, 37, -1)
        ours = np.einsum("ai,bj,ijd->abd", axis, axis, square).reshape(256, -1)
        np.testing.assert_allclose(ours, theirs[0, 1:], atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# CMMD


def test_cmmds_embeddings_are_those_of_transformers_for_the_square_in_the_middle(tmp_path):
    model = small_clip("quick_gelu", vision={"image_size": 20})
    model.save_pretrained(tmp_path)
    squares = [Image.fromarray(image[:, 6:46]).resize((20, 20), Image.Resampling.BICUBIC) for image in IMAGES]
    view = as_torch((np.stack(squares) / 255 - OPENAI_MEAN) / OPENAI_STD)
    network = load_features("cmmd", str(tmp_path))
    ours = np.asarray(jax.jit(lambda network, images: network.view(images))(network, IMAGES.astype(np.float32) / 255))
    assert np.abs(ours - view.permute(0, 2, 3, 1).numpy()).max() < 1e-5
    with torch.no_grad():
        theirs = model.double().visual_projection(model.vision_model(pixel_values=view).pooler_output)
    theirs = theirs / theirs.norm(dim=-1, keepdim=True)
    assert relative_error(of_view(network, view), theirs) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# LPIPS


@pytest.mark.parametrize("stored", ["folder", "whole"])
@pytest.mark.parametrize("trunk", ["alex", "vgg"])
def test_lpips_is_the_transcription(trunk, stored, tmp_path):
    features, layers = random_weights_of_lpips(trunk)
    if stored == "folder":
        torch.save(features, tmp_path / {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}[trunk])
        torch.save(layers, tmp_path / f"{trunk}.pth", _use_new_zipfile_serialization=False)
    else:
        torch.save(whole(features, layers), tmp_path / "lpips.pth")
    network = load_distance("lpips", str(tmp_path if stored == "folder" else tmp_path / "lpips.pth"))
    pairs = np.random.default_rng(0).random((3, 2, 40, 52, 3), np.float32)
    pairs[2, 1] = pairs[2, 0]
    measure = jax.jit(lambda network, pairs: network.distance(network.view(pairs)))
    ours = measure(network, pairs)
    theirs = distances(features, layers, as_torch(pairs[:, 0]), as_torch(pairs[:, 1]))
    assert relative_error(ours, theirs) < 1e-5 and theirs[:2].min() > 0.1 and ours[2] == 0
    assert relative_error(measure(network, pairs[:, ::-1]), theirs) < 1e-5
    with pytest.raises(ValueError, match="images of 40 x 31 pixels; LPIPS needs at least 32 x 32"):
        measure(network, pairs[:, :, :31, :40])
