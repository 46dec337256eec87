"""Inception v3 (arXiv:1512.00567) as TensorFlow's graph of December 2015 has it, whose features FID is computed from.

It differs from other Inceptions: average pooling does not count the padding, and the last block pools by maximum.
Attribute names are those of the weights for torch (github.com/mseitzer/pytorch-fid, toshas/torch-fidelity).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flax_pref.models.layers import lecun_normal
from flax_pref.shapes import Float, Squares

SIZE = 299  # pixels of the square that it sees
EPSILON = 1e-3
UNIT = 16  # every number of channels of the published network is a multiple of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionConfig:
    """Width: every number of channels is `unit / 16` of the published one, so that tests can have a narrow network."""

    unit: int = UNIT

    def __post_init__(self):
        if not 1 <= self.unit <= UNIT:
            raise ValueError(f"InceptionConfig: unit={self.unit} is not supported; supported: 1 to {UNIT}")


class Kernel(nnx.Module):
    """The kernel of a convolution, `[height, width, in, out]`, which has no bias."""

    def __init__(self, shape: tuple[int, int, int, int], *, param_dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(lecun_normal(rngs.params(), shape, param_dtype))


class BatchNorm(nnx.Module):
    """Normalisation by the mean and variance of the training set, which are weights here."""

    def __init__(self, features: int, *, param_dtype):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.mean = nnx.Param(jnp.zeros((features,), param_dtype))
        self.variance = nnx.Param(jnp.ones((features,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C] -> [B, H, W, C]`, in float32."""
        scale, bias, mean, variance = (
            part[...].astype(jnp.float32) for part in (self.scale, self.bias, self.mean, self.variance)
        )
        return (x.astype(jnp.float32) - mean) * (scale * jax.lax.rsqrt(variance + EPSILON)) + bias


class BasicConv2d(nnx.Module):
    """A convolution, its normalisation, and the positive part."""

    def __init__(
        self,
        into: int,
        out: int,
        size: tuple[int, int],
        *,
        stride: int = 1,
        padded: bool = False,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
    ):
        self.conv = Kernel((*size, into, out), param_dtype=param_dtype, rngs=rngs)
        self.bn = BatchNorm(out, param_dtype=param_dtype)
        self.stride = stride
        self.padding = tuple((length // 2, length // 2) if padded else (0, 0) for length in size)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, in] -> [B, H', W', out]`."""
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.conv.kernel[...].astype(self.dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(self.bn(y)).astype(self.dtype)


def max_pool(x: jax.Array, *, stride: int, padding: int = 0) -> jax.Array:
    """The largest of 3x3 positions, `[B, H, W, C] -> [B, H', W', C]`."""
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), around)


def average_pool(x: jax.Array) -> jax.Array:
    """The mean of the 3x3 positions around each that are inside the image, `[B, H, W, C] -> [B, H, W, C]`."""

    def sums(values: jax.Array) -> jax.Array:
        around = ((0, 0), (1, 1), (1, 1), (0, 0))
        return jax.lax.reduce_window(values, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), around)

    return (sums(x.astype(jnp.float32)) / sums(jnp.ones((1, *x.shape[1:3], 1)))).astype(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# The blocks, with the names of their branches in the weights: letters tell parts that have the same input


class _Block(nnx.Module):
    """What blocks share: how their convolutions are made."""

    def __init__(self, config: InceptionConfig, into: int, **kinds):
        def conv(source: int, out: int, height: int, width: int | None = None, *, stride: int = 1) -> BasicConv2d:
            """Channels in units of 1/16 of the published width; padded so that stride 1 keeps the size."""
            size = (height, height if width is None else width)
            wide = (source * config.unit // UNIT, out * config.unit // UNIT)
            return BasicConv2d(*wide, size, stride=stride, padded=stride == 1, **kinds)

        self._build(conv, into)

    def _build(self, conv, into: int) -> None:
        raise NotImplementedError


class InceptionA(_Block):
    """35 x 35 positions."""

    def __init__(self, config: InceptionConfig, into: int, pool_features: int, **kinds):
        self._pool_features = pool_features
        super().__init__(config, into, **kinds)

    def _build(self, conv, into: int) -> None:
        self.branch1x1 = conv(into, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = conv(into, 48, 1), conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = conv(into, 64, 1), conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3)
        self.branch_pool = conv(into, self._pool_features, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C] -> [B, H, W, C']`."""
        branches = [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionB(_Block):
    """From 35 x 35 to 17 x 17 positions."""

    def _build(self, conv, into: int) -> None:
        self.branch3x3 = conv(into, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = conv(into, 64, 1), conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3, stride=2)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C] -> [B, H', W', C']`."""
        branches = [
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            max_pool(x, stride=2),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionC(_Block):
    """17 x 17 positions; 7 x 7 neighbourhoods by rows and columns."""

    def __init__(self, config: InceptionConfig, into: int, between: int, **kinds):
        self._between = between
        super().__init__(config, into, **kinds)

    def _build(self, conv, into: int) -> None:
        between = self._between
        self.branch1x1 = conv(into, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = conv(into, between, 1), conv(between, between, 1, 7)
        self.branch7x7_3 = conv(between, 192, 7, 1)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = conv(into, between, 1), conv(between, between, 7, 1)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = conv(between, between, 1, 7), conv(between, between, 7, 1)
        self.branch7x7dbl_5 = conv(between, 192, 1, 7)
        self.branch_pool = conv(into, 192, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C] -> [B, H, W, C]`."""
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(average_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionD(_Block):
    """From 17 x 17 to 8 x 8 positions."""

    def _build(self, conv, into: int) -> None:
        self.branch3x3_1, self.branch3x3_2 = conv(into, 192, 1), conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = conv(into, 192, 1), conv(192, 192, 1, 7)
        self.branch7x7x3_3, self.branch7x7x3_4 = conv(192, 192, 7, 1), conv(192, 192, 3, stride=2)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C] -> [B, H', W', C']`."""
        branches = [
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))),
            max_pool(x, stride=2),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionE(_Block):
    """8 x 8 positions; the last block pools by maximum, the one before by mean."""

    def __init__(self, config: InceptionConfig, into: int, *, last: bool, **kinds):
        self._last = last
        super().__init__(config, into, **kinds)

    def _build(self, conv, into: int) -> None:
        self.branch1x1 = conv(into, 320, 1)
        self.branch3x3_1 = conv(into, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = conv(384, 384, 1, 3), conv(384, 384, 3, 1)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = conv(into, 448, 1), conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = conv(384, 384, 1, 3), conv(384, 384, 3, 1)
        self.branch_pool = conv(into, 192, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C] -> [B, H, W, C']`."""
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = max_pool(x, stride=1, padding=1) if self._last else average_pool(x)
        branches = [
            self.branch1x1(x),
            *(self.branch3x3_2a(single), self.branch3x3_2b(single)),
            *(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)),
            self.branch_pool(pooled),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV3(nnx.Module):
    """The network up to its last pooling, without the layer of classes."""

    def __init__(self, config: InceptionConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def conv(into: int, out: int, size: int, **options) -> BasicConv2d:
            return BasicConv2d(into, out * config.unit // UNIT, (size, size), **options, **kinds)

        def wide(channels: int) -> int:
            return channels * config.unit // UNIT

        self.Conv2d_1a_3x3 = conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = conv(wide(32), 32, 3)
        self.Conv2d_2b_3x3 = conv(wide(32), 64, 3, padded=True)
        self.Conv2d_3b_1x1 = conv(wide(64), 80, 1)
        self.Conv2d_4a_3x3 = conv(wide(80), 192, 3)
        self.Mixed_5b = InceptionA(config, 192, 32, **kinds)
        self.Mixed_5c = InceptionA(config, 256, 64, **kinds)
        self.Mixed_5d = InceptionA(config, 288, 64, **kinds)
        self.Mixed_6a = InceptionB(config, 288, **kinds)
        self.Mixed_6b = InceptionC(config, 768, 128, **kinds)
        self.Mixed_6c = InceptionC(config, 768, 160, **kinds)
        self.Mixed_6d = InceptionC(config, 768, 160, **kinds)
        self.Mixed_6e = InceptionC(config, 768, 192, **kinds)
        self.Mixed_7a = InceptionD(config, 768, **kinds)
        self.Mixed_7b = InceptionE(config, 1280, last=False, **kinds)
        self.Mixed_7c = InceptionE(config, 2048, last=True, **kinds)

    def __call__(self, images: Squares) -> Float[jax.Array, "images features"]:
        """Images of 299 x 299 pixels in [-1, 1], to the mean of the last block over positions, in float32."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(jnp.asarray(images))))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool(x, stride=2)))
        x = max_pool(x, stride=2)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c):
            x = block(x)
        for block in (self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c):
            x = block(x)
        return x.astype(jnp.float32).mean(axis=(1, 2))
