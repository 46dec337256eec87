"""What is trained: adapters of one backbone, or networks with weights of their own beside a frozen base."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from flax_pref.checkpoints.lora import lora_network
from flax_pref.models.bank import Bank, Member
from flax_pref.models.lora import BASE, DEFAULT_TARGETS, join_lora, split_lora, stack_lora
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
        with_old: name of an older copy of the module that is asked beside it, and the graphdef of a network with
            adapters of both; None: there is none.
    """

    modules: tuple[str, ...]
    graphdef: nnx.GraphDef
    weights: Weights
    with_old: tuple[str, nnx.GraphDef] | None = None

    @property
    def independent(self) -> Independent:
        """How their parameters hold modules that are trained independently."""
        return "stacked" if self.weights == "lora" else "named"

    def predict(self, params: Any, frozen: Any, old: Any = None) -> Bank:
        """The base and the modules as a `Predict`; see `diffusion.sampler`.

        Args:
            params: what is trained: parameters of the adapters, or those of a network for each module.
            frozen: parameters of the base; empty where nobody asks it.
            old: those of the older copy, as params; None: it is not asked.
        """
        if self.weights == "lora":
            if old is None:
                return Bank((Member(BASE, self.graphdef, join_lora(frozen, params)),))
            assert self.with_old is not None
            return Bank((Member(BASE, self.with_old[1], join_lora(frozen, stack_lora((params, old)))),))
        networks = {name: params[name] for name in self.modules} | ({BASE: frozen} if frozen else {})
        if old is not None:
            assert self.with_old is not None
            (networks[self.with_old[0]],) = old.values()
        return Bank(tuple(Member(name, self.graphdef, each) for name, each in networks.items()))


def trained_networks(
    base: Network, modules: tuple[str, ...], weights: Weights, lora: LoRA, *, old: str | None = None
) -> tuple[Trained, Callable[[dict, jax.Array], Any]]:
    """The networks of a run, and how their parameters begin.

    Args:
        base: UNet; its parameters may be shapes.
        modules: names of what is trained.
        weights: "lora" or "full".
        lora: kind of the adapters.
        old: name of an older copy of the only module, if there is one.

    Returns:
        the networks, and a function `(params of the base, key) -> params` of those that are trained, in float32, to be
        jitted: adapters that change nothing yet, or a copy of the base for each module.
    """

    def adapted(names, params, key):
        network = base._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
        return lora_network(network, names, rank=lora.rank, alpha=lora.effective_alpha, targets=lora.targets, key=key)

    def new_adapters(params, key):
        return split_lora(adapted(modules, params, key).params)[1]

    def copies(params, key):
        return {name: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params) for name in modules}

    def graphdef(*names):
        if weights == "full":
            return base.graphdef

        def adapted_module(params):
            network = adapted(names, params, jax.random.key(0))
            return nnx.merge(network.graphdef, network.params)

        return nnx.graphdef(nnx.eval_shape(adapted_module, base.params))

    with_old = None if old is None else (old, graphdef(*modules, old))
    trained = Trained(modules, graphdef(*modules), weights, with_old)
    return trained, copies if weights == "full" else new_adapters
