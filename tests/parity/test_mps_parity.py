"""MPS from files as its authors and others write them, against the same network in torch."""

import math

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flax_pref.checkpoints.mps_files import load_mps_model
from flax_pref.checkpoints.tokenizer import clip_tokenizer
from flax_pref.rewards.mps import CONDITION, load_mps_reward
from flax_pref.rewards.preprocessing import OPENAI_MEAN, OPENAI_STD
from tests.parity.mps_reference import MPS
from tests.parity.torch_reference import relative_error

CAPTIONS = ["a photo of a cat", "", "an oil painting of the sea at dawn, " * 9]
SIZE = 12


@pytest.fixture(scope="module")
def theirs():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MPS(text={"vocab_size": 49408, "max_position_embeddings": 77}).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """The network saved whole, its weights by name, and these as another library names them."""
    folder = tmp_path_factory.mktemp("mps")
    torch.save(theirs, folder / "MPS_overall_checkpoint.pth")
    torch.save(theirs.state_dict(), folder / "state_dict.pth")
    weights = {f"mps.{name}": weight.contiguous() for name, weight in theirs.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    clip_tokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((len(CAPTIONS), SIZE, SIZE, 3), np.float32)


def scores(theirs, images, ids):
    """Of images in [0, 1], in float64."""
    pixels = (images.astype(np.float64) - OPENAI_MEAN) / OPENAI_STD
    ids, condition = (torch.from_numpy(np.int64(rows)) for rows in (ids, clip_tokenizer()([CONDITION])[0]))
    theirs.double()
    try:
        return theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), ids, condition).numpy()
    finally:
        theirs.float()


@pytest.mark.parametrize("name", ["MPS_overall_checkpoint.pth", "state_dict.pth", "model.safetensors"])
def test_scores_are_those_of_torch(theirs, folder, images, name):
    reward = load_mps_reward(str(folder / name))
    assert reward.name == "mps" and reward.differentiable
    prepared = reward.prepare(CAPTIONS)
    ours = jax.jit(lambda reward, images, prepared: reward.score(reward.view(images), prepared))(
        reward, images, prepared
    )
    expected = scores(theirs, images, prepared)
    assert expected.std() > 0.05 * abs(expected).max()
    assert relative_error(ours, expected) < 1e-5


def test_words_far_from_the_condition_are_not_seen(theirs, folder, images):
    """Otherwise the mask could be wrong without a difference."""
    ids = load_mps_reward(str(folder) + "/model.safetensors").prepare(CAPTIONS)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    ids, condition = (torch.from_numpy(np.int64(rows)) for rows in (ids, clip_tokenizer()([CONDITION])[0]))
    assert relative_error(theirs(pixels, ids, condition), theirs(pixels, ids, condition, near=-np.inf)) > 1e-3


def test_gradients_of_the_image_are_those_of_finite_differences_in_float64(theirs, folder, images):
    reward = load_mps_reward(str(folder / "model.safetensors"))
    prepared = reward.prepare(CAPTIONS)
    gradient = jax.jit(jax.grad(lambda images: reward.score(reward.view(images), prepared).sum()))(images)
    rng = np.random.default_rng(1)
    for direction in rng.standard_normal((3, *images.shape)):
        ahead, behind = (scores(theirs, images + step * direction, prepared).sum() for step in (1e-5, -1e-5))
        size = np.linalg.norm(gradient) * np.linalg.norm(direction) / math.sqrt(direction.size)
        assert abs(np.vdot(gradient, direction) - float(ahead - behind) / 2e-5) < 1e-4 * size


def test_a_score_does_not_depend_on_the_others(folder, images):
    reward = load_mps_reward(str(folder / "model.safetensors"))
    score = jax.jit(lambda images, prepared: reward.score(reward.view(images), prepared))
    together = score(images, reward.prepare(CAPTIONS))
    alone = [score(images[i : i + 1], reward.prepare(CAPTIONS[i : i + 1])) for i in range(len(CAPTIONS))]
    assert relative_error(np.concatenate(alone), together) < 1e-5


QUERY = "cross_model.layers.1.0.fn.to_q.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({QUERY: None}, r"no weight 'cross\.1\.to_q\.weight' \(1 weight missing\)"),
        ({QUERY: torch.ones(24, 11)}, rf"weight '{QUERY}' has shape \[24, 11\], expected \[24, 10\]"),
        ({QUERY: torch.full((24, 10), torch.nan)}, rf"weight '{QUERY}' holds numbers that are not finite"),
        ({"cross_model.more.weight": torch.ones(2)}, r"weight 'cross_model\.more\.weight' \(1 weight too many\)"),
        ({"cross_model.layers.0.0.fn.to_kv.weight": None}, r"no weight 'cross_model\.layers\.0\.0\.fn\.to_kv\.weight'"),
        ({"model.visual_projection.weight": None}, r"no weight 'visual_projection\.weight' \(1 weight missing\)"),
    ],
)
def test_a_file_that_is_not_mps_is_refused_in_one_line(theirs, tmp_path, change, message):
    changed = {name: value for name, value in ({**theirs.state_dict(), **change}).items() if value is not None}
    torch.save(changed, file := tmp_path / "mps.pth")
    with pytest.raises(ValueError, match=message) as error:
        load_mps_model(file)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
