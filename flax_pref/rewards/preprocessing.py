"""Images as the networks of scorers see them: resized as their authors do it, cropped or padded, and normalised.

Most scorers were trained on 8-bit images that Pillow had resized. Pillow rounds to 8 bits after each of its two passes,
one along the rows and one along the columns; without that, pixels of photographs are up to 1.1/255 away from its own.
So both passes round here too, and gradients ignore it. An image that has its size already is not rounded.

HPSv2 is the exception: its authors resize the tensor, so torch's kernel resamples it, which neither rounds nor clips.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.shapes import Array

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

LEVELS = 255
# Pillow's weights are fixed-point numbers (src/libImaging/Resample.c, PRECISION_BITS). With exact ones values halfway
# between two levels fall to the other side three times as often, after both passes now and then by two levels.
WEIGHT_UNIT = 2.0**-22


def resize(images: Array, size: tuple[int, int], *, in_levels: bool = True) -> Array:
    """Bicubic resampling with antialiasing, as `Image.resize(..., Image.Resampling.BICUBIC)` of Pillow has it.

    With `in_levels=False`, as `torch.nn.functional.interpolate(mode="bicubic", antialias=True)` of a floating-point
    tensor: the same weights, nothing rounded and nothing clipped.

    In levels, within 1/255 of Pillow 13, and equal except for about one in 50,000 values, those halfway between two
    levels. Before Pillow 13 the pass along the rows always came first, which is another order for images that are more
    than about twice as high as wide, and can be 3/255 away.

    Args:
        images: `[B, H, W, 3]` in [0, 1].
        size: (height, width).
        in_levels: whether each pass rounds to the 256 levels of 8 bits.

    Returns:
        `[B, height, width, 3]`. In levels these lie in [0, 1], multiples of 1/255 along with their rounding errors;
        gradients are those of the passes without rounding; where a pass leaves [0, 1] it is clipped, and there they
        are zero. Otherwise values overshoot [0, 1] beside sharp edges.
    """
    height, width = size
    return _cropped(images, size, (0, 0), (height, width), in_levels)


def clip_view(images: Array, size: int, mean: Sequence[float], std: Sequence[float]) -> Array:
    """The shortest side to `size`, centre crop, normalised: `CLIPImageProcessor` of transformers.

    An odd number of pixels too many is split with the smaller half at the top or left.

    Args:
        images: `[B, H, W, 3]` in [0, 1].
        size: of the square, in pixels.
        mean: of each channel, in [0, 1].
        std: of each channel.

    Returns:
        `[B, size, size, 3]`.
    """
    height, width = _shortest_to(size, images)
    return normalise(
        _cropped(images, (height, width), ((height - size) // 2, (width - size) // 2), (size, size)), mean, std
    )


def square_view(
    images: Array, size: int, mean: Sequence[float], std: Sequence[float], *, shortest: int | None = None
) -> Array:
    """The shortest side to `size`, centre crop, normalised: `Resize` and `CenterCrop` of torchvision.

    ImageReward, OpenAI's CLIP and OpenCLIP have it so; DINOv2 crops more, from a shortest side of `shortest` pixels.
    Arguments and result as in `clip_view`, from which it differs where an odd number of pixels is cropped: half of it
    is rounded to the even number.
    """
    height, width = _shortest_to(size if shortest is None else shortest, images)
    start = (round((height - size) / 2), round((width - size) / 2))
    return normalise(_cropped(images, (height, width), start, (size, size)), mean, std)


def padded_view(images: Array, size: int, mean: Sequence[float], std: Sequence[float]) -> Array:
    """The longest side to `size`, black bars to the square, normalised: `ResizeMaxSize` of HPSv2's OpenCLIP.

    That resizes the tensor of `ToTensor` with the defaults of torchvision's `resize`: here those since version 0.17,
    which antialiases tensors as it does images of Pillow. Older versions did not, and gave other scores.

    Bars are black in the image, not zero after normalisation; of an odd number of pixels the larger half is at the
    bottom or right. Arguments and result as in `clip_view`. Where the longest side is `size` already the authors' code
    leaves the bars out, and a network that takes squares fails: here they are added.
    """
    scale = size / max(images.shape[1:3])
    height, width = (max(1, round(length * scale)) for length in images.shape[1:3])
    before = ((size - height) // 2, (size - width) // 2)
    bars = [(first, size - length - first) for first, length in zip(before, (height, width), strict=True)]
    resized = resize(images, (height, width), in_levels=False)
    return normalise(jnp.pad(resized, ((0, 0), *bars, (0, 0))), mean, std)


def cropped_view(images: Array, size: int, mean: Sequence[float], std: Sequence[float]) -> Array:
    """The largest square in the middle, resized to `size` and normalised, as CMMD's authors do it.

    Arguments and result as in `clip_view`. An odd number of pixels too many is split with the smaller half at the top
    or left.
    """
    height, width = images.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return normalise(resize(images[:, top : top + side, left : left + side], (size, size)), mean, std)


def resize_as_tensorflow(images: Array, size: tuple[int, int]) -> Array:
    """Bilinear resizing of TensorFlow 1: without antialiasing, and the first pixels of both lie on one another.

    Args:
        images: `[B, H, W, 3]`, of any range.
        size: (height, width).

    Returns:
        `[B, height, width, 3]`.
    """
    for axis, wanted in ((2, size[1]), (1, size[0])):
        length = images.shape[axis]
        place = np.arange(wanted, dtype=np.float32) * np.float32(length / wanted)
        first = place.astype(np.int64)
        share = (place - first.astype(np.float32)).reshape((-1, 1) if axis == 2 else (-1, 1, 1))
        before = jnp.take(images, first, axis=axis)
        images = before + (jnp.take(images, np.minimum(first + 1, length - 1), axis=axis) - before) * share
    return images


def normalise(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """`(images - mean) / std` per channel, `[B, H, W, 3]`."""
    return (images - np.asarray(mean, images.dtype)) / np.asarray(std, images.dtype)


def _shortest_to(size: int, images: Array) -> tuple[int, int]:
    """Height and width with the shortest side at `size`; the other one is rounded down."""
    shortest = min(images.shape[1:3])
    height, width = (size * length // shortest for length in images.shape[1:3])
    return height, width


def _cropped(
    images: Array, size: tuple[int, int], start: tuple[int, int], count: tuple[int, int], in_levels: bool = True
) -> Array:
    """`count` rows and columns from `start` on of images resized to `size`; what is cropped is never computed."""
    images = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    rows, columns = (length - wanted for length, wanted in zip(images.shape[1:3], size, strict=True))
    vertical_first = rows > 2 * max(columns, 0)  # Pillow 13
    for axis in (1, 2) if vertical_first else (2, 1):
        images = _pass(images, axis, size[axis - 1], start[axis - 1], count[axis - 1], in_levels)
    return images


def _pass(images: Array, axis: int, size: int, start: int, count: int, in_levels: bool) -> Array:
    """Resizes one axis to `size`, of which `count` pixels from `start` on are wanted."""
    if images.shape[axis] == size:
        return jax.lax.slice_in_dim(images, start, start + count, axis=axis)
    weights = _weights(images.shape[axis], size, np.arange(start, start + count)).astype(images.dtype)
    # In levels, because their products with fixed-point weights are exact; at full precision on every device.
    levels = jnp.tensordot(LEVELS * images, weights, ((axis,), (1,)), precision=jax.lax.Precision.HIGHEST)
    levels = jnp.moveaxis(levels, -1, axis)
    if not in_levels:
        return levels / LEVELS
    levels = jnp.clip(levels, 0, LEVELS)
    rounded = levels + jax.lax.stop_gradient(jnp.floor(levels + 0.5) - levels)
    return rounded / LEVELS


def _weights(length: int, size: int, wanted: np.ndarray) -> np.ndarray:
    """Weights `[wanted, length]` of `length` pixels for those `wanted` of `size` pixels; each row sums to one.

    Pixel i of the result lies at `(i + 1/2) length / size`. Where images shrink the kernel is widened by that ratio.
    """
    ratio = length / size
    width = max(ratio, 1.0)
    centre = ((wanted + 0.5) * ratio)[:, None]
    first = np.maximum(np.trunc(centre - 2 * width + 0.5), 0)
    end = np.minimum(np.trunc(centre + 2 * width + 0.5), length)
    pixels = np.arange(length)
    weights = np.where((first <= pixels) & (pixels < end), _bicubic((pixels + 0.5 - centre) / width), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.round(weights / WEIGHT_UNIT) * WEIGHT_UNIT


def _bicubic(x: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel (Keys, 1981, equation 4 with a = -1/2), zero from |x| = 2 on."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))
