"""Networks as data: configuration, structure and parameters, which is what crosses `jax.jit`."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from flax_pref.models.attention import Kernel
from flax_pref.models.remat import Remat, set_remat
from flax_pref.models.unet import set_attention


class Network(NamedTuple):
    """A network as data; `nnx.merge(graphdef, params)` is the module.

    Attributes:
        config: UNetConfig, VAEConfig or CLIPTextConfig.
        graphdef: structure of the module, hashable.
        params: nested dict of arrays.
    """

    config: Any
    graphdef: nnx.GraphDef
    params: dict


def with_attention(network: Network, kernel: Kernel) -> Network:
    """A UNet with another kernel for its attention; see `models.attention`.

    Raises:
        ValueError: there is no such kernel.
    """
    unet = nnx.merge(network.graphdef, network.params)
    set_attention(unet, kernel)
    return network._replace(graphdef=nnx.graphdef(unet))


def with_remat(network: Network, remat: Remat) -> Network:
    """A network that keeps less for the backward pass; see `models.remat.set_remat`.

    Raises:
        ValueError: there is no such policy.
    """
    module = nnx.merge(network.graphdef, network.params)
    set_remat(module, remat)
    return network._replace(graphdef=nnx.graphdef(module))


def replicated(network: Network, mesh: jax.sharding.Mesh | None) -> Network:
    """The network with its parameters on every device of a mesh; as it is where there is none."""
    if mesh is None:
        return network
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return network._replace(params=jax.device_put(network.params, everywhere))
