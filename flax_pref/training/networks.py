"""What is trained: adapters of one backbone, or networks with weights of their own beside a frozen base."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from flax_pref.checkpoints.lora import lora_network
from flax_pref.models.bank import Bank, Member
from flax_pref.models.lora import BASE, DEFAULT_TARGETS, join_lora, split_lora
from flax_pref.models.network import Network
from flax_pref.training.step import Independent


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters (arXiv:2106.09685).

    Example:
        >>> adapters = fp.LoRA(rank=8, alpha=16.0, targets=("to_q", "to_v"))
    """

    rank: int = 16
    alpha: float | None = None
    """The deltas are scaled by alpha / rank; None: alpha is the rank, which programs that do not read it assume."""
    targets: tuple[str, ...] = DEFAULT_TARGETS
    """Names of the adapted layers, or the ends of their dotted paths, such as to_q or ff.net.2."""

    def __post_init__(self):
        if self.rank < 1 or (self.alpha is not None and not self.alpha > 0):
            raise ValueError(f"lora: rank={self.rank}, alpha={self.alpha}; expected positive numbers")

    @property
    def effective_alpha(self) -> float:
        """Alpha, as `add_lora` takes it."""
        return float(self.rank if self.alpha is None else self.alpha)


Weights = Literal["lora", "full"]


@dataclasses.dataclass(frozen=True)
class Trained:
    """The networks of a run: names, structure, and how parameters become predictions.

    Attributes:
        modules: names of the M networks that are trained.
        graphdef: of the network with adapters, or of each of several networks without.
        weights: "lora" or "full".
    """

    modules: tuple[str, ...]
    graphdef: nnx.GraphDef
    weights: Weights

    @property
    def independent(self) -> Independent:
        """How their parameters hold modules that are trained independently."""
        return "stacked" if self.weights == "lora" else "named"

    def predict(self, params: Any, frozen: Any) -> Bank:
        """The base and the modules as a `Predict`; see `diffusion.sampler`.

        Args:
            params: what is trained: parameters of the adapters, or those of a network for each module.
            frozen: parameters of the base; empty where nobody asks it.
        """
        if self.weights == "lora":
            return Bank((Member(BASE, self.graphdef, join_lora(frozen, params)),))
        base = (Member(BASE, self.graphdef, frozen),) if frozen else ()
        return Bank((*base, *(Member(name, self.graphdef, params[name]) for name in self.modules)))


def trained_networks(
    base: Network, modules: tuple[str, ...], weights: Weights, lora: LoRA
) -> tuple[Trained, Callable[[dict, jax.Array], Any]]:
    """The networks of a run, and how their parameters begin.

    Args:
        base: UNet; its parameters may be shapes.
        modules: names of what is trained.
        weights: "lora" or "full".
        lora: kind of the adapters.

    Returns:
        the networks, and a function `(params of the base, key) -> params` of those that are trained, in float32, to be
        jitted: adapters that change nothing yet, or a copy of the base for each module.
    """

    def adapted(params, key):
        network = base._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
        return lora_network(network, modules, rank=lora.rank, alpha=lora.effective_alpha, targets=lora.targets, key=key)

    def new_adapters(params, key):
        return split_lora(adapted(params, key).params)[1]

    def copies(params, key):
        return {name: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params) for name in modules}

    if weights == "full":
        return Trained(modules, base.graphdef, weights), copies

    def adapted_module(params):
        network = adapted(params, jax.random.key(0))
        return nnx.merge(network.graphdef, network.params)

    return Trained(modules, nnx.graphdef(nnx.eval_shape(adapted_module, base.params)), weights), new_adapters
