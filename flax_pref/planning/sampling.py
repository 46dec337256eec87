"""The programs that draw images with shapes instead of weights, as they would be compiled for a mesh."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_pref.checkpoints.abstract import conditioning_shapes
from flax_pref.checkpoints.diffusers import Pipeline
from flax_pref.checkpoints.lora import lora_network
from flax_pref.diffusion.conditioning import encode_ids
from flax_pref.diffusion.guidance import Rule, tabulate
from flax_pref.diffusion.latents import decode_latents
from flax_pref.diffusion.sampler import image_keys, sample
from flax_pref.diffusion.solvers import Solver
from flax_pref.models.bank import AXIS, Bank, Member, Stack, places
from flax_pref.models.network import Network
from flax_pref.planning.plan import Job


def with_adapters(network: Network, modules: Sequence[str], rank: int) -> Network:
    """An abstract network with a bank of adapters."""
    options = {"rank": rank, "alpha": float(rank), "key": jax.random.key(0)}

    def adapted(params):
        own = lora_network(network._replace(params=params), modules, **options)
        return nnx.merge(own.graphdef, own.params)

    graphdef, state = nnx.split(nnx.eval_shape(adapted, network.params))
    return network._replace(graphdef=graphdef, params=nnx.to_pure_dict(state))


def drawing_jobs(
    pipeline: Pipeline,
    modules: Mapping[str, Network],
    rule: Rule,
    solver: Solver,
    mesh: Mesh,
    *,
    size: tuple[int, int],
    batch_size: int,
) -> list[Job]:
    """What `diffusion.text_to_image.TextToImage` compiles: text encoders, sampler and decoder.

    Args:
        pipeline: abstract, see `checkpoints.abstract`; its UNet may carry adapters.
        modules: abstract networks with weights of their own, by their names in the rule.
        rule: of guidance.
        solver: of the steps.
        mesh: of the devices; with an axis "network", base and modules lie side by side on it.
        size: height and width of the images in pixels.
        batch_size: images on all devices.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    divided = NamedSharding(mesh, PartitionSpec(tuple(name for name in mesh.axis_names if name != AXIS)))

    def placed(tree: Any, sharding: NamedSharding = whole) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    networks = {"base": pipeline.unet, **modules}
    if AXIS in mesh.shape:
        count = places(len(networks), mesh)
        several = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), pipeline.unet.params)
        side_by_side = placed(several, NamedSharding(mesh, PartitionSpec(AXIS)))
        bank = Stack(tuple(networks), pipeline.unet.graphdef, mesh, side_by_side)
    else:
        bank = Bank(tuple(Member(name, own.graphdef, placed(own.params)) for name, own in networks.items()))
    vae, encoders = placed(pipeline.vae.params), [placed(own.params) for own in pipeline.text_encoders]
    held = {"UNets": bank, "autoencoder": vae, "text encoders": encoders}
    factor = pipeline.vae.config.downscale_factor
    shape = (size[0] // factor, size[1] // factor, pipeline.vae.config.latent_channels)

    def encode(params, ids):
        own = [network._replace(params=each) for network, each in zip(pipeline.text_encoders, params, strict=True)]
        return encode_ids(dataclasses.replace(pipeline, text_encoders=tuple(own)), ids)

    def draw(bank, table, solver, keys, text, empty):
        return sample(bank, table, solver, keys, text, empty, shape)

    def decode(params, latents):
        shards = mesh.size // mesh.shape.get(AXIS, 1)
        return decode_latents(pipeline.vae._replace(params=params), latents, shards=shards)

    family = (pipeline.unet.config, [network.config for network in pipeline.text_encoders])
    text = {
        name: jax.ShapeDtypeStruct((batch_size, *own), jnp.float32)
        for name, own in conditioning_shapes(*family, sizes=True).items()
    }
    length = text["encoder_hidden_states"].shape[1]
    ids = [jax.ShapeDtypeStruct((batch_size, length), jnp.int32) for _ in pipeline.text_encoders]
    empty = {name: jax.ShapeDtypeStruct(own.shape[1:], own.dtype) for name, own in text.items()}
    keys = jax.eval_shape(lambda: image_keys(0, range(batch_size)))
    strengths = jax.tree.map(jnp.asarray, (tabulate(rule, len(solver.timesteps), batch_size), solver))
    latents = placed(jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32), divided)
    sampled = (bank, *placed(strengths), placed(keys, divided), placed(text, divided), placed(empty))
    common = {"held": held, "work": batch_size, "unit": "image"}
    return [  # the largest last: the compiler is still busy with one when the next begins, see `planning.plan.laid_out`
        Job("text encoders", jax.jit(encode), (encoders, placed(ids, divided)), part="text encoders", **common),
        Job("decoder", jax.jit(decode), (vae, latents), part="VAE", **common),
        Job(f"sampler of {len(solver.timesteps)} steps", jax.jit(draw), sampled, part="sampler", **common),
    ]
