"""Saturation, contrast and sharpness against matplotlib, NumPy and SciPy in float64."""

import jax
import numpy as np
import pytest
from matplotlib.colors import rgb_to_hsv
from scipy import ndimage

from flax_pref.rewards.reward import load_reward

LAPLACIAN = [[0, 1, 0], [1, -4, 1], [0, 1, 0]]


def luma(image):
    return image @ [0.299, 0.587, 0.114]


EXPECTED = {
    "saturation": lambda image: rgb_to_hsv(image)[..., 1].mean(),
    "contrast": lambda image: luma(image).std(),
    "sharpness": lambda image: ndimage.convolve(255 * luma(image), LAPLACIAN, mode="mirror").var(),
}


@pytest.fixture(scope="module")
def images():
    """Noise, a photograph's soft shades, black, and one colour."""
    rng = np.random.default_rng(0)
    soft = ndimage.gaussian_filter(rng.random((24, 32, 3)), (4, 4, 0))
    even = np.full((24, 32, 3), [0.2, 0.4, 0.1])
    return np.stack([rng.random((24, 32, 3)), soft, np.zeros((24, 32, 3)), even]).astype(np.float32)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_measure_is_that_of_the_library_and_has_a_gradient(name, images):
    reward = load_reward(name)
    assert reward.name == name and reward.differentiable
    prepared = reward.prepare(["a"] * len(images))
    scores = jax.jit(lambda reward, images: reward.score(reward.view(images), prepared))(reward, images)
    assert scores.dtype == np.float32
    expected = [EXPECTED[name](image.astype(np.float64)) for image in images]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    assert len({round(float(value), 4) for value in expected}) >= 3
    gradient = jax.grad(lambda images: reward.score(reward.view(images), prepared).sum())(images)
    assert np.isfinite(gradient).all() and np.abs(gradient[0]).max() > 0
