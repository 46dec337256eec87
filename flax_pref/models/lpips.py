"""LPIPS (arXiv:1801.03924): how different two images look, by the layers of AlexNet or VGG-16, weighed as people do.

Version 0.1 of its authors, whose networks see images in [-1, 1], shifted and scaled.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_pref.models import config as config_io
from flax_pref.models.inception import Kernel
from flax_pref.models.layers import Conv
from flax_pref.shapes import Array, Float

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10
LEAST_SIZE = 32  # pixels; of smaller images deep layers of AlexNet see nothing


@dataclasses.dataclass(frozen=True)
class Trunk:
    """A network of torchvision up to its last layer that is compared.

    Attributes:
        convolutions: kernel, stride and padding of each.
        places: of the convolutions among all of its layers, as stored names count them.
        pooled: before which convolutions the image is pooled.
        pool: pixels that are pooled to one; they are two apart.
        compared: after which convolutions features are compared.
    """

    convolutions: tuple[tuple[int, int, int], ...]
    places: tuple[int, ...]
    pooled: tuple[int, ...]
    pool: int
    compared: tuple[int, ...]


TRUNKS = {
    "alex": Trunk(
        convolutions=((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1)),
        places=(0, 3, 6, 8, 10),
        pooled=(1, 2),
        pool=3,
        compared=(0, 1, 2, 3, 4),
    ),
    "vgg": Trunk(
        convolutions=((3, 1, 1),) * 13,
        places=(0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        pooled=(2, 4, 7, 10),
        pool=2,
        compared=(1, 3, 6, 9, 12),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LPIPSConfig:
    """Which network, and the channels of its convolutions."""

    trunk: str
    channels: tuple[int, ...]

    def __post_init__(self):
        if self.trunk not in TRUNKS:
            raise ValueError(f"LPIPSConfig: trunk={self.trunk!r}; supported: {', '.join(TRUNKS)}")
        config_io.check_sizes(self, ("channels",))
        if len(self.channels) != len(TRUNKS[self.trunk].convolutions):
            raise ValueError(f"LPIPSConfig: {len(self.channels)} convolutions are not those of {self.trunk}")


class LPIPS(nnx.Module):
    """The network and the weights of its channels."""

    def __init__(self, config: LPIPSConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.trunk = config.trunk
        trunk, widths = TRUNKS[config.trunk], (3, *config.channels)
        self.convs = nnx.List(
            [
                Conv(
                    *(widths[i], widths[i + 1], size),
                    stride=stride,
                    padding=(padding, padding),
                    dtype=dtype,
                    param_dtype=param_dtype,
                    rngs=rngs,
                )
                for i, (size, stride, padding) in enumerate(trunk.convolutions)
            ]
        )
        kinds = {"param_dtype": param_dtype, "rngs": rngs}
        self.lins = nnx.List([Kernel((1, 1, config.channels[i], 1), **kinds) for i in trunk.compared])

    def __call__(self, images: Float[Array, "pairs 2 height width 3"]) -> Float[jax.Array, " pairs"]:
        """Pairs of images in [0, 1] to a distance each, in float32; 0 for equal images."""
        pairs, (height, width) = len(images), images.shape[2:4]
        if min(height, width) < LEAST_SIZE:
            raise ValueError(f"images of {width} x {height} pixels; LPIPS needs at least {LEAST_SIZE} x {LEAST_SIZE}")
        x = (2 * jnp.asarray(images) - 1).reshape(2 * pairs, height, width, 3)
        x = (x - np.asarray(SHIFT, np.float32)) / np.asarray(SCALE, np.float32)
        trunk, total = TRUNKS[self.trunk], jnp.zeros(pairs, jnp.float32)
        for i, conv in enumerate(self.convs):
            if i in trunk.pooled:
                window = (1, trunk.pool, trunk.pool, 1)
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "VALID")
            x = jax.nn.relu(conv(x))
            if i in trunk.compared:
                total += self._difference(x, self.lins[trunk.compared.index(i)].kernel[...])
        return total

    @staticmethod
    def _difference(x: jax.Array, weights: jax.Array) -> jax.Array:
        """Weighed squares between the images of each pair, `[2 P, H, W, C]` to the mean over positions, `[P]`."""
        x = x.astype(jnp.float32)
        x = x / (jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True)) + EPSILON)
        squares = jnp.square(x[::2] - x[1::2])
        return (squares @ weights.astype(jnp.float32)[0, 0, :, 0]).mean(axis=(1, 2))
