"""Weights in eight bits: kept as integers or float8 with a scale for each output channel, and full where they are used.

    params = quantize(params, "int8")  # of a network that was split; nothing else about it changes

Layers read `kernel[...].astype(dtype)`, which is all that a `Quantized` kernel has to answer. This saves memory, not
time: products are of the layers' dtype, as before.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from flax_pref.models.choices import QuantizedType
from flax_pref.models.tree import flatten_dict

# float8 with four bits of exponent and three of mantissa (arXiv:2209.05433): that with more exponent is for gradients.
DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A kernel `values * scale`.

    Attributes:
        values: int8 or float8, `[..., out]`.
        scale: float32 `[1, ..., out]`.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.values.shape

    def __getitem__(self, index: Any) -> "Quantized":
        if index is not ...:
            raise TypeError(f"Quantized: index {index!r}; only the whole of a kernel can be read, by kernel[...]")
        return self

    def astype(self, dtype) -> jax.Array:
        """The kernel in full."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def quantize(params: dict, to: QuantizedType) -> dict:
    """Quantises the kernels of linear layers and convolutions; biases, norms and adapters stay as they are.

    Args:
        params: nested parameters.
        to: "int8", or "fp8": float8_e4m3fn.

    Raises:
        ValueError: qwix is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise ValueError("weights in eight bits need qwix; pip install 'flax-pref[quantize]'") from error

    @jax.jit
    def stored(kernel: jax.Array) -> Quantized:
        array = qwix.quantize(kernel.astype(jnp.float32), DTYPES[to], channelwise_axes=(kernel.ndim - 1,))
        return Quantized(array.qvalue, array.scale)

    flat = flatten_dict(params)
    return unflatten_dict({path: stored(leaf) if path[-1] == "kernel" else leaf for path, leaf in flat.items()})


def at_use(params: dict, *inputs: Any) -> tuple[Any, ...]:
    """The arguments, where params holds `Quantized` kernels such that these become full when inputs are there.

    To be called in a loop's body, with inputs that differ from pass to pass: XLA would make all kernels full before the
    loop and keep them, which is the memory that was to be saved.
    """
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    if not any(isinstance(leaf, Quantized) for leaf in leaves):
        return params, *inputs
    return jax.lax.optimization_barrier((params, *inputs))
