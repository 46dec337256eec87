"""What the backward pass computes again instead of keeping it."""

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import jax
from flax import nnx

from flax_pref.models.layers import later

Remat = Literal["none", "block"]


def recomputed(call: Callable, modules: Any, x: jax.Array, *others: Any) -> jax.Array:
    """`call(modules, x, *others)`, of which the backward pass keeps the arguments and nothing else.

    Does what `jax.checkpoint` does without its barriers, of which XLA leaves nothing on CPUs.

    Args:
        call: pure.
        modules: nnx modules, or a tuple of them.
        x: `[B, ...]`.
        others: arrays or pytrees of them.

    Returns:
        What `call` does: an array of as many axes as x, or fewer.
    """
    graphdef, state = nnx.split(modules)

    def forward(state, *inputs):
        return call(nnx.merge(graphdef, state), *inputs)

    def backward(known, gradient):
        state, x, *others = known
        some = gradient[(..., *(slice(1),) * (gradient.ndim - 1))]
        return jax.vjp(forward, state, later(x, some), *others)[1](gradient)

    again = jax.custom_vjp(forward)
    again.defvjp(lambda *known: (forward(*known), known), backward)
    return again(state, x, *others)


def set_remat(module: nnx.Module, remat: Remat) -> None:
    """Says what a network computes again in the backward pass instead of keeping it, in place.

    Args:
        module: a network whose blocks have an attribute `remat`.
        remat: "none", or "block": all inside each block, which costs a second forward pass. Of a UNet a block is a
            resnet and the transformer that follows it, of an autoencoder a resnet.

    Raises:
        ValueError: there is no such choice.
    """
    if remat not in get_args(Remat):
        raise ValueError(f"set_remat: remat must be one of {', '.join(get_args(Remat))}, got {remat!r}")
    for _, block in nnx.iter_modules(module):
        if hasattr(block, "remat"):
            cast(Any, block).remat = remat
