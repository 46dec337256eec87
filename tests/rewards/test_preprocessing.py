"""What scorers see of an image, against Pillow, torch, transformers and transcriptions of authors' preprocessing."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import PIL
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from flax_pref.rewards.preprocessing import OPENAI_MEAN, OPENAI_STD, clip_view, padded_view, resize, square_view

LEVEL = 1 / 255
OPENAI = (OPENAI_MEAN, OPENAI_STD)


@pytest.fixture(scope="module")
def photograph():
    """512 x 600 pixels, in colour."""
    file = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return Image.open(file).convert("RGB")


def floats(image):
    return np.asarray(image, np.float32)[None] / 255


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((512, 512), [(224, 224)]),
        ((1024, 1024), [(224, 224)]),
        ((600, 512), [(336, 300), (600, 130), (5, 7), (262, 224)]),
        ((301, 517), [(224, 384), (520, 517), (1, 1)]),
        ((60, 100), [(224, 373), (59, 99)]),
        ((17, 400), [(224, 224)]),
        ((1, 64), [(224, 224)]),
        ((64, 1), [(65, 20)]),
        pytest.param(
            (500, 90),
            [(224, 40), (40, 300)],
            marks=pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="columns first since Pillow 13"),
        ),
    ],
    ids=str,
)
def test_resized_photographs_are_those_of_pillow(photograph, shape, sizes):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for image in (photograph.resize(shape[::-1], Image.Resampling.LANCZOS), Image.fromarray(noise)):
        for size in sizes:
            theirs = floats(image.resize(size[::-1], Image.Resampling.BICUBIC))
            errors = np.abs(resize(floats(image), size) - theirs) / LEVEL
            assert errors.max() < 1.001
            # Values halfway between two levels may fall to either side, others must not.
            assert (errors > 0.001).mean() < 3e-4


def test_an_image_of_its_size_is_not_rounded():
    images = np.random.default_rng(0).random((1, 8, 8, 3), np.float32)
    np.testing.assert_array_equal(resize(images, (8, 8)), images)
    np.testing.assert_array_equal(square_view(images, 8, (0, 0, 0), (1, 1, 1)), images)


# Crops of an even number of pixels, and of odd ones whose halves torchvision rounds down and up.
SHAPES = [(64, 64), (600, 512), (96, 130), (64, 97), (64, 99), (131, 64), (40, 33), (33, 40), (512, 8), (2, 700)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clip_scorers_see_what_transformers_makes_of_an_image(photograph, shape):
    image = photograph.resize(shape[::-1])
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    theirs = processor(image, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_array_less(differences(clip_view(floats(image), 64, *OPENAI), theirs), 1.001)


def differences(ours, theirs):
    """Of two normalised images, in levels; a shift by a pixel is far more than one."""
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs) * np.array(OPENAI_STD) / LEVEL


def normalised(image):
    return (floats(image) - np.array(OPENAI_MEAN)) / np.array(OPENAI_STD)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_imagereward_sees_what_torchvision_makes_of_an_image(photograph, shape):
    image = photograph.resize(shape[::-1])
    width, height = image.size
    if width < height:
        resized = image.resize((64, int(64 * height / width)), Image.Resampling.BICUBIC)
    else:
        resized = image.resize((int(64 * width / height), 64), Image.Resampling.BICUBIC)
    left, top = (round((length - 64) / 2.0) for length in resized.size)
    theirs = normalised(resized.crop((left, top, left + 64, top + 64)))
    np.testing.assert_array_less(differences(square_view(floats(image), 64, *OPENAI), theirs), 1.001)


def resized_by_torch(image, size):
    """`[1, height, width, 3]`, in float64: torch's own float32 is up to 1.4e-5 away from it."""
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(image, dtype=torch.float64).movedim(-1, 1)
    return torch.nn.functional.interpolate(tensor, size, mode="bicubic", antialias=True).movedim(1, -1).numpy()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hpsv2_sees_the_whole_image_between_black_bars_as_torch_resizes_it(photograph, shape):
    image = floats(photograph.resize(shape[::-1]))
    scale = 64 / float(max(shape))
    height, width = (max(1, round(length * scale)) for length in shape)
    top, left = (64 - height) // 2, (64 - width) // 2
    theirs = np.zeros((1, 64, 64, 3))
    theirs[:, top : top + height, left : left + width] = resized_by_torch(image, (height, width))
    np.testing.assert_allclose(padded_view(image, 64, (0, 0, 0), (1, 1, 1)), theirs, rtol=0, atol=2e-6)
    theirs = (theirs - np.array(OPENAI_MEAN)) / np.array(OPENAI_STD)
    np.testing.assert_allclose(padded_view(image, 64, *OPENAI), theirs, rtol=0, atol=1e-5)


def test_hpsv2_sees_what_overshoots_beside_an_edge():
    image = np.zeros((1, 40, 40, 3), np.float32)
    image[:, :, 21:] = 1
    view = padded_view(image, 64, (0, 0, 0), (1, 1, 1))
    np.testing.assert_allclose(view, resized_by_torch(image, (64, 64)), rtol=0, atol=2e-6)
    assert view.min() < -0.01 and view.max() > 1.01


@pytest.mark.parametrize("view", [clip_view, square_view, padded_view])
def test_an_extremely_long_image_takes_no_memory_for_what_is_cropped(view):
    images = np.linspace(0, 1, 3 * 20_000, dtype=np.float32).reshape(1, 1, 20_000, 3)
    assert view(images, 64, *OPENAI).shape == (1, 64, 64, 3)


def test_gradients_are_those_of_the_resampling_without_rounding():
    rng = np.random.default_rng(0)
    images = (0.3 + 0.4 * rng.random((1, 9, 7, 3))).astype(np.float32)  # nothing is clipped
    cotangent = rng.standard_normal((1, 5, 12, 3)).astype(np.float32)
    gradient = jax.grad(lambda images: jnp.sum(resize(images, (5, 12)) * cotangent))(images)
    # Row i: what Pillow makes of a light at pixel i; it does not round floating-point images.
    lights = [Image.fromarray(np.eye(length, dtype=np.float32)) for length in (9, 7)]
    rows, columns = (
        np.asarray(light.resize((n, light.height), Image.Resampling.BICUBIC))
        for light, n in zip(lights, (5, 12), strict=True)
    )
    np.testing.assert_allclose(gradient, np.einsum("bvuc,hv,wu->bhwc", cotangent, rows, columns), atol=1e-5)


def test_no_gradient_flows_where_the_kernel_overshoots():
    images = np.zeros((1, 4, 8, 3), np.float32)
    images[:, :, 4:] = 1
    gradient = jax.grad(lambda images: resize(images, (4, 16))[0, 0, 5].sum())(images)
    assert resize(images, (4, 16))[0, 0, 5, 0] == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("view", [clip_view, square_view, padded_view])
def test_a_view_does_not_depend_on_the_batch_or_on_the_dtype_of_the_images(photograph, view):
    images = np.concatenate([floats(photograph.resize((90, 70))), floats(photograph.crop((100, 50, 190, 120)))])
    both = jax.jit(lambda images: view(images, 64, *OPENAI))(images)
    assert both.dtype == jnp.float32
    np.testing.assert_array_equal(both[1:], jax.jit(lambda images: view(images, 64, *OPENAI))(images[1:]))
    assert view(jnp.asarray(images, jnp.bfloat16), 64, *OPENAI).dtype == jnp.float32
