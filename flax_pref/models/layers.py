"""Layers that the UNet, the autoencoder and the text encoder share.

Arrays are channels-last (`[B, H, W, C]`). Every layer computes in `dtype` and keeps its parameters in `param_dtype`;
normalisation statistics and softmax are always float32. Attribute names are those of the published checkpoints, so that
loading is a renaming of leaves (`checkpoints/weights.py`).
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_pref.models.platform import CACHED, per_device, platform, unless_differentiated
from flax_pref.shapes import Array


def normal(key: jax.Array, shape: tuple[int, ...], std: float, dtype) -> jax.Array:
    """Draws from N(0, std^2)."""
    size = math.prod(shape)
    # In powers of two: outside of jit JAX compiles a generator for every new size, half a second each.
    draws = jax.random.normal(key, (2 ** (size - 1).bit_length(),))
    return (std * draws[:size].reshape(shape)).astype(dtype)


def lecun_normal(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """N(0, 1 / fan_in): the forward pass of a deep network keeps its scale from layer to layer (LeCun et al., 1998)."""
    return normal(key, shape, math.prod(shape[:-1]) ** -0.5, dtype)


class Keys:
    """The keys that `nnx.Rngs(params=key)` gives, counted in Python.

    Under a trace nnx asks at each key for the sharding of its counter, and JAX answers with a message whose making
    grows with what has been traced: most of the time that a large network took to be described by its shapes.
    """

    def __init__(self, key: jax.Array):
        self._key, self._count = key, 0

    def params(self) -> jax.Array:
        """The next key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count - 1)


class Linear(nnx.Module):
    """`y = x @ kernel + bias` over the last axis; `kernel [in, out]`, `bias [out]` or None."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(lecun_normal(rngs.params(), (in_features, out_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in] -> [..., out]`."""
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def projections(x: jax.Array, layers: Sequence[Linear]) -> list[jax.Array]:
    """What linear layers of one size make of one input; `[..., in] -> [..., out]` each.

    On TPUs it is one product of layers without adapters or bias, a third faster. The kernels are stacked along a new
    axis, so that a mesh may divide the others.
    """
    if platform() != "tpu" or any(type(layer) is not Linear or layer.bias is not None for layer in layers):
        return [layer(x) for layer in layers]
    kernels = jnp.stack([layer.kernel[...].astype(layer.dtype) for layer in layers], axis=1)
    products = jnp.einsum("...i,ino->...no", x.astype(kernels.dtype), kernels)
    return [products[..., i, :] for i in range(len(layers))]


def halves(x: jax.Array, layer: Linear) -> tuple[jax.Array, jax.Array]:
    """Both halves of what a linear layer makes of its input; `[..., in] -> [..., out / 2]` each.

    On TPUs it is two products of a layer without adapters, whose results are used where they are made. Transformer
    blocks on v5e, with one product and with two, in million cycles outside of the kernels: forward, 6 x 4096 x 320 3.8
    and 3.1, 2 x 1024 x 1280 3.05 and 3.07; both passes with LoRA, 4 x 4096 x 320 10.2 and 9.1, with a quarter less
    memory.
    """
    if platform() != "tpu" or type(layer) is not Linear or layer.bias is None:
        first, second = jnp.split(layer(x), 2, axis=-1)
        return first, second
    kernels, biases = (jnp.split(each[...].astype(layer.dtype), 2, axis=-1) for each in (layer.kernel, layer.bias))
    first, second = (x.astype(layer.dtype) @ kernel + bias for kernel, bias in zip(kernels, biases, strict=True))
    return first, second


class Conv(nnx.Module):
    """Two-dimensional convolution of a `[B, H, W, C]` array; `kernel [kh, kw, in, out]` (HWIO), `bias [out]`.

    `padding` is the (before, after) padding of both spatial axes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
        kernel_init=lecun_normal,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_features, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype))
        self.stride = stride
        self.padding = padding
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, in] -> [B, H', W', out]`."""
        y = convolve(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride, self.padding)
        return y + self.bias[...].astype(self.dtype)


# Of fewer rows than these a CPU convolves no faster by Eigen. 192 images of 8 x 8 x 128 to 64 channels, by YNNPACK and
# by Eigen, in GFLOP/s: 103 and 136; but of 4 x 4 x 128 172 and 142.
FEW_ROWS = 8
FEW_POSITIONS = 512
# Fewer images of a device than these are few on a TPU. Forward passes of a resnet on v5e (libtpu 0.0.42), by rows and
# by XLA, in million cycles: 2 x 128 x 128 x 960 18.1 and 23.8, 4 x 64 x 64 x 1280 11.3 and 15.0, 7 x 64 x 64 x 640 6.8
# and 9.4, 1 x 512 x 512 x 512 34.4 and 51.3; but 8 x 64 x 64 x 640 7.7 and 4.4, 8 x 128 x 128 x 320 18.1 and 8.3.
FEW_IMAGES = 8
# Bytes of an image, up to which two or three have room for copies of their rows: 2 x 128 x 128 x 960 to 320 channels
# takes 7.4 and 8.3, but 190 MB of temporary memory and 81. The rows of one image need no copy, and XLA's copies of four
# and more need more room: 4 x 128 x 128 x 640 takes 16.2 and 20.8, and 505 MB and 735.
ROOM = 2**24


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int]) -> jax.Array:
    """`[B, H, W, in], [kh, kw, in, out] -> [B, H', W', out]`; `padding` is that before and after both spatial axes."""
    size, out_features = kernel.shape[0], kernel.shape[-1]
    if size == 1 and stride == 1:  # faster as the matrix product that it is: by a third on CPUs, three times on TPUs
        return jnp.pad(x, ((0, 0), padding, padding, (0, 0))) @ kernel.reshape(-1, out_features)
    if platform() == "tpu" and stride == 1 and size == 3 and per_device(x.shape[0]) < FEW_IMAGES:
        return _by_rows(x, kernel, padding)
    if platform() != "cpu":
        return _xla(x, kernel, stride, padding)
    if (size, stride, padding) == (3, 1, (1, 1)) and x.shape[1] >= FEW_ROWS and x.dtype == jnp.float32:
        # XLA's gradients of the convolution with the row that is cut off take 20 times as long.
        return unless_differentiated(_by_eigen, lambda x, kernel: _by_ynnpack(x, kernel, 1, (1, 1)))(x, kernel)
    return _by_ynnpack(x, kernel, stride, padding)


def _by_eigen(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution on a CPU by Eigen: XLA gives those to YNNPACK whose result has no more rows than their input.

    Eigen takes four fifths of the time, and half of it where there are few positions of many channels.
    """
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 2), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y[:, :-1]


def _by_ynnpack(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int]) -> jax.Array:
    """A convolution on a CPU: a product of patches where positions are few, else image by image if a batch is large."""
    if stride == 1 and math.prod(x.shape[:3]) <= FEW_POSITIONS:
        # XLA's convolution for CPUs is up to four times slower than a matrix product where positions are few.
        size = len(kernel)
        x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
        height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
        patches = [x[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
        return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])

    if x.nbytes > CACHED:
        # A batch that a CPU's cache does not hold takes up to a third longer than its images one after another.
        return jnp.concatenate([_xla(image, kernel, stride, padding) for image in jnp.split(x, len(x))])
    return _xla(x, kernel, stride, padding)


def _xla(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int]) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _sum_of_rows(x: jax.Array, kernel: jax.Array, padding: tuple[int, int]) -> jax.Array:
    """A 3x3 convolution as the sum of three along rows, one for each row of the kernel, accumulated in float32.

    A TPU computes a batch of images side by side. Of few images XLA makes many narrow ones, and to cut and to join them
    takes longer than the convolution; here the rows of all images are the batch.
    """
    x = jnp.pad(x, ((0, 0), padding, (0, 0), (0, 0)))
    height = x.shape[1] - 2

    def along_rows(i: int) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x[:, i : i + height].reshape(-1, *x.shape[2:]),
            kernel[i],
            (1,),
            (padding,),
            dimension_numbers=("NWC", "WIO", "NWC"),
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        )

    total = along_rows(0) + along_rows(1) + along_rows(2)
    return total.reshape(x.shape[0], height, *total.shape[1:]).astype(x.dtype)


# Positions of an image, up to which the gradient of a kernel is XLA's. Both passes of a resnet on v5e, two images, with
# the gradient by rows and with XLA's, in million cycles: 64 x 64 x 320 1.81 and 1.80, 32 x 32 x 1280 4.70 and 4.25,
# 16 x 16 x 1280 1.69 and 1.20; but 128 x 128 x 320 6.56 and 7.72, 128 x 128 x 960 49.3 and 56.6. And the three float32
# gradients of rows, which wait to be joined, were a third of the temporary memory of SD1.5's training.
XLA_GRADIENT = 64 * 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_rows(x: jax.Array, kernel: jax.Array, padding: tuple[int, int]) -> jax.Array:
    """A 3x3 convolution of few images, forward and backward by rows where that is faster."""
    if per_device(x.shape[0]) in (2, 3) and x.nbytes // x.shape[0] > ROOM:
        return _xla(x, kernel, 1, padding)
    return _sum_of_rows(x, kernel, padding)


def _by_rows_backward(padding, known, gradient):
    x, kernel = known

    def of_kernel(kernel):
        if x.shape[1] * x.shape[2] <= XLA_GRADIENT:
            return _xla(x, kernel, 1, padding)
        return _sum_of_rows(x, kernel, padding)

    # Both passes of 2 x 128 x 128 x 960 to 320 channels, with the forward pass by XLA: 24.1 million cycles and 558 MB;
    # with the gradients by XLA too, 32.4 and 726 MB.
    (dx,) = jax.vjp(lambda x: _sum_of_rows(x, kernel, padding), x)[1](gradient)
    return dx, jax.vjp(of_kernel, kernel)[1](gradient)[0]


_by_rows.defvjp(lambda x, kernel, padding: (_by_rows(x, kernel, padding), (x, kernel)), _by_rows_backward)


# ----------------------------------------------------------------------------------------------------------------------
# Normalisation and activations, with gradients that keep their input and nothing else
#
# What is cheap to compute again should not be kept for the backward pass. On CPUs XLA removes the barriers of
# `jax.checkpoint` and finds the second computation to be the first: `later` is what it does not see through.


def later(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """`x`, but not before there is a gradient; arrays broadcast. Where the gradient is not finite it is NaN."""
    return x + 0 * gradient.astype(x.dtype)


@jax.custom_vjp
def silu(x: jax.Array) -> jax.Array:
    """`x sigmoid(x)`, `[...] -> [...]`."""
    return jax.nn.silu(x)


def _silu_backward(x, gradient):
    return jax.vjp(jax.nn.silu, later(x, gradient))[1](gradient)


silu.defvjp(lambda x: (silu(x), x), _silu_backward)


@jax.custom_vjp
def gated_gelu(value: jax.Array, gate: jax.Array) -> jax.Array:
    """`value GELU(gate)`, `[...], [...] -> [...]`; exact, except in 16-bit types, see `gelu`."""
    return value * gelu(gate)


def gelu(x: jax.Array) -> jax.Array:
    """`x` times the standard normal distribution's probability of less (arXiv:1606.08415), `[...] -> [...]`.

    For 16-bit types a fit, within 2.6e-5 of it, where bfloat16 rounds 0.1 by 2e-4: the error function would take three
    times as long as the matrix product behind it on a TPU.
    """
    if x.dtype.itemsize > 2:
        return jax.nn.gelu(x, approximate=False)
    x32 = x.astype(jnp.float32)
    square = jnp.minimum(jnp.square(x32), 64.0)  # beyond, it is x or zero
    logit = x32 * (1.595015727 + square * (0.07401132035 - 0.0007030380810 * square))
    return (x32 * jax.nn.sigmoid(logit)).astype(x.dtype)


def _gated_gelu_backward(known, gradient):
    value, gate = known
    return jax.vjp(lambda value, gate: value * gelu(gate), value, later(gate, gradient))[1](gradient)


gated_gelu.defvjp(lambda *known: (gated_gelu(*known), known), _gated_gelu_backward)


def _normalised(means: Callable, epsilon: float, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias` in float32, or float64 if x is.

    `means` are those over what is normalised.
    """
    return _normalise_forward(means, epsilon, x, scale, bias)[0]


_normalise = jax.custom_vjp(_normalised, nondiff_argnums=(0, 1))


def _normalise_forward(means, epsilon, x, scale, bias):
    kind = jnp.promote_types(x.dtype, jnp.float32)
    wide = x.astype(kind)
    mean = means(wide)
    if x.dtype.itemsize > 2:
        variance = means(jnp.square(wide - mean))
    else:
        # Of 16-bit numbers E[x^2] - E[x]^2, for which x is read once. Where the mean is 100 times the spread, it is
        # wrong by a thousandth, but x itself is rounded to a fifth of its spread then.
        variance = jnp.maximum(means(jnp.square(wide)) - jnp.square(mean), 0)
    inverse_std = jax.lax.rsqrt(variance + epsilon)
    y = (wide - mean) * inverse_std * scale.astype(kind) + bias.astype(kind)
    return y, (x, scale, bias, mean, inverse_std)


def _normalise_backward(means, epsilon, known, gradient):
    x, scale, bias, mean, inverse_std = known
    first = gradient[(slice(None), *(slice(1),) * (x.ndim - 2))]  # [B, 1..., C]
    normed = (x.astype(mean.dtype) - later(mean, first)) * inverse_std
    scaled = gradient * later(scale.astype(mean.dtype), first)
    dx = inverse_std * (scaled - means(scaled) - normed * means(scaled * normed))
    over = tuple(range(x.ndim - 1))
    dscale, dbias = (gradient * normed).sum(axis=over), gradient.sum(axis=over)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


_normalise.defvjp(_normalise_forward, _normalise_backward)


class GroupNorm(nnx.Module):
    """Normalises groups of neighbouring channels over all positions (arXiv:1803.08494, equation 1).

    Of 32-bit numbers the variance is the mean of squared deviations, not `E[x^2] - E[x]^2`: the autoencoder's
    activations have means far larger than their spread, where the difference of two large numbers loses every digit.
    """

    def __init__(self, features: int, num_groups: int, *, epsilon: float, dtype=jnp.float32, param_dtype=jnp.float32):
        if features % num_groups:
            raise ValueError(
                f"GroupNorm: {features} channels cannot be divided into norm_num_groups={num_groups} groups; "
                "choose block_out_channels that are multiples of norm_num_groups"
            )
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.num_groups = num_groups
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, ..., C] -> [B, ..., C]`."""
        return _normalise(self._group_means, self.epsilon, x, self.scale[...], self.bias[...]).astype(self.dtype)

    def _group_means(self, x: jax.Array) -> jax.Array:
        """Mean over all positions and a group's channels, repeated for each of these: `[B, ..., C] -> [B, 1..., C]`."""
        # Positions first, then the few channels of a group: channels stay the fastest axis, several times faster than
        # one reduction over both on CPUs.
        means = x.mean(axis=tuple(range(1, x.ndim - 1)), keepdims=True)
        grouped = means.reshape(*means.shape[:-1], self.num_groups, -1).mean(axis=-1)
        return jnp.repeat(grouped, x.shape[-1] // self.num_groups, axis=-1)


class LayerNorm(nnx.Module):
    """Normalises the last axis (arXiv:1607.06450)."""

    def __init__(self, features: int, *, epsilon: float = 1e-5, dtype=jnp.float32, param_dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., C] -> [..., C]`."""
        return _normalise(_last_mean, self.epsilon, x, self.scale[...], self.bias[...]).astype(self.dtype)


def _last_mean(x: jax.Array) -> jax.Array:
    return x.mean(axis=-1, keepdims=True)


class Embedding(nnx.Module):
    """A table of vectors, `embedding [num, features]`, looked up by row."""

    def __init__(self, num: int, features: int, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(init(rngs.params(), (num, features), param_dtype))
        self.dtype = dtype

    def __call__(self, ids: Array) -> jax.Array:
        """`[...] integers -> [..., features]`."""
        return jnp.take(self.embedding[...], ids, axis=0).astype(self.dtype)


def timestep_embedding(
    timesteps: jax.Array, features: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> jax.Array:
    """Sinusoidal embedding of scalars (arXiv:2006.11239, after arXiv:1706.03762 section 3.5), in float32.

    Args:
        timesteps: `[B]` timesteps (or any scalars, e.g. image sizes), integer or float.
        features: size of the embedding.
        flip_sin_to_cos: cosines come first.
        freq_shift: the frequencies are `10000 ** (-i / (features / 2 - freq_shift))`.

    Returns:
        `[B, features]` float32.
    """
    half = features // 2
    # Rounded to float32 step by step as the networks saw it in training: at t = 1000 one unit in the last place of a
    # frequency moves the angle by 6e-5.
    exponents = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    angles = timesteps.astype(jnp.float32)[:, None] * np.exp(exponents)[None, :]
    waves = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.pad(jnp.concatenate(waves, axis=-1), ((0, 0), (0, features % 2)))


# Images of a device from which it pays to fill a resnet's batch up to FEW_IMAGES, unless it has so many channels that
# the matrix units are busy. Six images on v5e, and with two of zeros, in million cycles: 128 x 128 x 320 12.8 and 8.3,
# 128 x 128 x 960 to 320 24.9 and 21.7, 64 x 64 x 640 5.7 and 5.0; but 32 x 32 x 1280 4.3 and 4.4.
FILLED_UP = 6
MANY_CHANNELS = 1280


def filled_up(x: jax.Array) -> jax.Array:
    """A batch with images of zeros behind those of each device, so that a device has `FEW_IMAGES`."""
    images = x.reshape(-1, per_device(len(x)), *x.shape[1:])
    filled = jnp.pad(images, ((0, 0), (0, FEW_IMAGES - images.shape[1]), *((0, 0),) * (x.ndim - 1)))
    return filled.reshape(-1, *x.shape[1:])


class ResnetBlock2D(nnx.Module):
    """Two 3x3 convolutions with a skip connection; a time embedding, where there is one, is added between them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int | None = None,
        num_groups: int,
        epsilon: float,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.norm1 = GroupNorm(in_channels, num_groups, epsilon=epsilon, **kinds)
        self.conv1 = Conv(in_channels, out_channels, 3, padding=(1, 1), **kinds, rngs=rngs)
        self.time_emb_proj = Linear(temb_channels, out_channels, **kinds, rngs=rngs) if temb_channels else None
        self.norm2 = GroupNorm(out_channels, num_groups, epsilon=epsilon, **kinds)
        self.conv2 = Conv(out_channels, out_channels, 3, padding=(1, 1), **kinds, rngs=rngs)
        self.conv_shortcut = (
            Conv(in_channels, out_channels, 1, **kinds, rngs=rngs) if in_channels != out_channels else None
        )

    def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
        """`[B, H, W, in], [B, temb_channels] -> [B, H, W, out]`."""
        shift = None
        if self.time_emb_proj is not None:
            assert temb is not None, "a resnet with a projection of the time embedding needs one"
            shift = self.time_emb_proj(jax.nn.silu(temb))[:, None, None, :]
        if not self.is_filled_up(x):
            return self.transform(x, shift)
        y = self.transform(filled_up(x), None if shift is None else filled_up(shift))
        return y.reshape(-1, FEW_IMAGES, *y.shape[1:])[:, : per_device(len(x))].reshape(-1, *y.shape[1:])

    def transform(self, x: jax.Array, shift: jax.Array | None) -> jax.Array:
        """`[B, H, W, in], [B, 1, 1, out] -> [B, H, W, out]`."""
        h = self.conv1(silu(self.norm1(x)))
        if shift is not None:
            h = h + shift
        h = self.conv2(silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))

    def is_filled_up(self, x: jax.Array) -> bool:
        """Whether images of zeros join a batch: six or seven of a TPU, of few channels, take longer than eight.

        Adapted convolutions, for which a row of the batch means a network, are left as they are.
        """
        images = per_device(len(x))
        few = platform() == "tpu" and FILLED_UP <= images < FEW_IMAGES and len(x) % images == 0
        plain = type(self.conv1) is type(self.conv2) is Conv and type(self.conv_shortcut) in (Conv, type(None))
        return few and plain and self.conv1.kernel[...].shape[-1] < MANY_CHANNELS


class Downsample2D(nnx.Module):
    """Halves height and width by a convolution with stride 2; `padding` as in `Conv`."""

    def __init__(self, channels: int, *, padding: tuple[int, int], dtype=jnp.float32, param_dtype=jnp.float32, rngs):
        self.conv = Conv(
            channels, channels, 3, stride=2, padding=padding, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C]`."""
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Doubles height and width by repeating pixels, then convolves."""

    def __init__(self, channels: int, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, 3, padding=(1, 1), dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array, size: Sequence[int] | None = None) -> jax.Array:
        """`[B, H, W, C] -> [B, 2H, 2W, C]`, cropped to `size` (height, width) if given.

        The crop undoes the rounding up of a downsampling from an odd size.
        """
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        if size is not None:
            x = x[:, : size[0], : size[1], :]
        return self.conv(x)
