"""Networks of one architecture under names: a base, and modules with adapters or with weights of their own.

    Bank((Member("base", graphdef, params),))    # adapters, if there are any, share one backbone and one batch
    Bank((Member("base", ...), Member("pos", ...), Member("neg", ...)))    # networks one after another
    stack({"base": ..., "pos": ..., "neg": ...}, mesh)    # networks side by side, on different devices

A bank is a pytree of its parameters, to be passed to a jitted function, and a `Predict` of `diffusion.sampler`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_pref.models.lora import BASE, LoRALayer, bank_predict, project_text
from flax_pref.shapes import Float, GivenRowLatents, RowLatents, Timesteps, Tree

AXIS = "network"  # of a mesh, for networks side by side


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Member:
    """A network, perhaps with adapters.

    Attributes:
        name: of the network without adapters; its adapters have names of their own.
        graphdef: of the network.
        params: its parameters, those of adapters included.
    """

    name: str = dataclasses.field(metadata={"static": True})
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    params: dict

    @property
    def networks(self) -> tuple[str, ...]:
        """All names that this member answers to."""
        return (self.name, *adapters(self.graphdef, self.params))


Share = tuple[Member, list[int], tuple[str, ...]]  # a member, its rows of an image, and their names within it


def adapters(graphdef: nnx.GraphDef, params: dict) -> tuple[str, ...]:
    """Names of the adapters of a network, in order."""
    layers = (layer for _, layer in nnx.iter_modules(nnx.merge(graphdef, params)))
    return next((layer.modules for layer in layers if isinstance(layer, LoRALayer)), ())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank:
    """Members that are evaluated one after another, each with all its rows in one batch."""

    members: tuple[Member, ...]

    def __call__(
        self, networks: tuple[str, ...], latents: GivenRowLatents, timesteps: Timesteps, text: Tree
    ) -> RowLatents:
        """Predicts; see `diffusion.sampler.Predict`.

        Raises:
            ValueError: no member has one of the networks, or two have it.
        """
        shares, predictions = self._shares(networks), []
        for member, rows, names in shares:
            own_latents, own_text = jax.tree.map(lambda x, rows=rows: _take(x, rows), (latents, text))
            predictions.append(bank_predict(member.graphdef, member.params)(names, own_latents, timesteps, own_text))
        return _in_order(shares, predictions)

    def project_text(self, networks: tuple[str, ...], text: dict) -> dict:
        """Text for predictions of the same R rows, with keys and values of its prompts; see `lora.project_text`.

        Raises:
            ValueError: as for a prediction.
        """
        shares = self._shares(networks)
        texts = [
            project_text(member.graphdef, member.params, names, jax.tree.map(lambda x, rows=rows: _take(x, rows), text))
            for member, rows, names in shares
        ]
        return jax.tree.map(lambda *parts: _in_order(shares, parts), *texts)

    def _shares(self, networks: tuple[str, ...]) -> list[Share]:
        """Each member that is asked, with its rows and the names of these within it."""
        names = [member.networks for member in self.members]
        owners = [_owner(network, names) for network in networks]
        shares = []
        for n in dict.fromkeys(owners):
            member = self.members[n]
            rows = [r for r, owner in enumerate(owners) if owner == n]
            shares.append((member, rows, tuple(BASE if networks[r] == member.name else networks[r] for r in rows)))
        return shares


def _in_order(shares: Sequence[Share], parts: Sequence[jax.Array]) -> jax.Array:
    """`[B, R, ...]` from the arrays of each member's rows."""
    rows = [r for _, own, _ in shares for r in own]
    return _take(jnp.concatenate(parts, axis=1), [rows.index(r) for r in range(len(rows))])


def _take(x: jax.Array, rows: list[int]) -> jax.Array:
    """Rows of an array `[B, R, ...]`, by static slices, which XLA joins where they are neighbours."""
    return x if rows == list(range(x.shape[1])) else jnp.stack([x[:, r] for r in rows], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stack:
    """Networks without adapters whose parameters lie side by side on the axis "network" of a mesh; see `stack`.

    Attributes:
        names: of the networks.
        graphdef: of each.
        mesh: has the axis.
        params: leaves `[N, ...]`, sharded over the axis; N is a multiple of its size, see `places`.
    """

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    params: dict

    def __call__(
        self, networks: tuple[str, ...], latents: GivenRowLatents, timesteps: Timesteps, text: Tree
    ) -> RowLatents:
        """Predicts; see `diffusion.sampler.Predict`.

        Raises:
            ValueError: no network has one of the names.
        """
        rows = len(networks)
        each = jnp.broadcast_to(jnp.eye(rows)[..., None], (rows, rows, len(latents)))
        return jnp.moveaxis(self.combine(each, networks, latents, timesteps, text), 0, 1)

    def combine(
        self,
        weights: Float[jax.Array, "sums rows images"],
        networks: tuple[str, ...],
        latents: GivenRowLatents,
        timesteps: Timesteps,
        text: Tree,
    ) -> Float[jax.Array, "sums images height width channels"]:
        """Weighted sums of predictions; what devices send each other is one reduction of the sums.

        Devices predict equally many rows: one that is asked for fewer takes any, which no sum contains, while others
        are busy.

        Args:
            weights: of each row in K sums, `[K, R, B]`.
            networks: as in a prediction, and the other arguments too.
            latents: `[B, R, H, W, C]`.
            timesteps: `[B]`.
            text: `[B, R, ...]` each.

        Returns:
            float32 `[K, B, H, W, C]`.

        Raises:
            ValueError: no network has one of the names.
        """
        owners = [_owner(network, [(name,) for name in self.names]) for network in networks]
        count = places(len(self.names), self.mesh)
        rows = [[r for r, owner in enumerate(owners) if owner == n] for n in range(count)]
        turns = count // self.mesh.shape[AXIS]  # networks of one device, which takes them in turn
        batch = tuple(name for name in self.mesh.axis_names if name != AXIS)
        images = PartitionSpec(batch)

        def local(params, weights, latents, timesteps, text):
            sums = jnp.zeros((len(weights), len(latents), *latents.shape[2:]), jnp.float32)
            for turn in range(turns):
                asked = _padded(rows[turn::turns])  # of each device
                if not asked.size:
                    continue
                own = jnp.asarray(asked)[jax.lax.axis_index(AXIS)]
                network = bank_predict(self.graphdef, jax.tree.map(lambda x, turn=turn: x[turn], params))
                own_latents, own_text = jax.tree.map(lambda x, own=own: x[:, own], (latents, text))
                predictions = network((BASE,) * len(own), own_latents, timesteps, own_text).astype(jnp.float32)
                # Not by a weight of zero, which would let infinities through.
                predictions = jnp.where((own < 0)[:, None, None, None], 0, predictions)
                # No matrix product: accelerators would round its factors, see `diffusion.sampler`.
                sums += (weights[:, own, :, None, None, None] * jnp.moveaxis(predictions, 1, 0)).sum(axis=1)
            return jax.lax.psum(sums, AXIS)

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(PartitionSpec(AXIS), PartitionSpec(None, None, batch), images, images, images),
            out_specs=PartitionSpec(None, batch),
            # What kernels return does not say over which axes it varies, which the check would ask for.
            check_vma=False,
        )(self.params, weights, latents, timesteps, text)


def _padded(rows: list[list[int]]) -> np.ndarray:
    """Lists of rows as `[len(rows), most]`, with -1, an index that every array has, where there is nothing to do."""
    most = max(map(len, rows))
    return np.array([own + [-1] * (most - len(own)) for own in rows], int)


def stack(networks: Mapping[str, tuple[nnx.GraphDef, dict]], mesh: Mesh) -> Stack:
    """Puts networks side by side, each on its own part of the mesh's axis "network".

    Args:
        networks: graphdef and parameters of each; parameters on the host (numpy arrays or on the CPU) take no memory
            of other devices.
        mesh: has the axis "network". Other axes divide the images of a batch.

    Raises:
        ValueError: there are fewer networks than half of the axis, or they have adapters, or differ in more than their
            weights.
    """
    names, size = tuple(networks), mesh.shape[AXIS]
    if 2 * len(names) <= size:
        raise ValueError(
            f"stack: {len(names)} network(s), {', '.join(names)}, for an axis {AXIS!r} of {size} in the mesh, most of "
            "which would be idle; choose a smaller axis"
        )
    kinds = {name: (graphdef, jax.tree.map(_kind, params)) for name, (graphdef, params) in networks.items()}
    for name, (graphdef, params) in networks.items():
        if own := adapters(graphdef, params):
            raise ValueError(
                f"stack: network {name!r} has adapters {', '.join(own)}, expected none: adapters share a backbone, "
                f"take a mesh without the axis {AXIS!r}, or merge them"
            )
        if kinds[name] != kinds[names[0]]:
            raise ValueError(
                f"stack: network {name!r} differs from {names[0]!r} in more than the values of its weights, expected "
                f"one architecture and dtype: take a mesh without the axis {AXIS!r}"
            )

    idle = places(len(names), mesh) - len(names)

    def put(*leaves):
        leaves += leaves[:1] * idle

        def shard(index):
            chosen = leaves[index[0]]
            return np.stack([np.asarray(leaf) for leaf in chosen])[(slice(None), *index[1:])]

        sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        return jax.make_array_from_callback((len(leaves), *leaves[0].shape), sharding, shard)

    params = jax.tree.map(put, *(params for _, params in networks.values()))
    return Stack(names, kinds[names[0]][0], mesh, params)


def places(networks: int, mesh: Mesh) -> int:
    """How many networks the axis "network" of a mesh is filled up to; nobody asks those beyond."""
    return math.ceil(networks / mesh.shape[AXIS]) * mesh.shape[AXIS]


def _kind(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _owner(network: str, names: list[tuple[str, ...]]) -> int:
    """The index of the tuple that has the name."""
    owners = [n for n, own in enumerate(names) for name in own if name == network]
    if len(owners) != 1:
        known = ", ".join(name for own in names for name in own)
        count = f"{len(owners)} networks are called" if owners else "no network is called"
        raise ValueError(f"bank: {count} {network!r}, expected one; there are {known}")
    return owners[0]
