"""The programs of a run with shapes instead of weights and data, as they would be compiled for a mesh."""

import dataclasses
import math
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_pref.checkpoints.abstract import abstract_pipeline, conditioning_shapes, describe
from flax_pref.data.buckets import size_text
from flax_pref.data.encode import CAPTIONS_AT_ONCE, pixel_encoder
from flax_pref.data.pipeline import host_batches
from flax_pref.data.preparation import EncodeConfig
from flax_pref.data.prepared import EMPTY, PreparedSet, Records, Shapes
from flax_pref.diffusion.conditioning import encode_ids
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.solvers import clean_estimate
from flax_pref.methods.online import OnlineMethod, RolloutInputs
from flax_pref.methods.step_pairs import StepPairs
from flax_pref.models.platform import default_dtype
from flax_pref.models.presets import Family
from flax_pref.models.remat import Remat
from flax_pref.parallel.mesh import TRAINING_AXES, make_mesh
from flax_pref.parallel.pieces import piece_spec
from flax_pref.parallel.sharding import batch_sharding
from flax_pref.planning.plan import Job
from flax_pref.planning.rewards import abstract_reward
from flax_pref.planning.topologies import Topology, chips_of
from flax_pref.rewards.decoded import score_gradients, score_latents
from flax_pref.training.rollouts import empty_for_each, take_batch
from flax_pref.training.trainer import Program, TrainConfig, check_data, held_by


def jobs(config: TrainConfig | EncodeConfig, slice: Topology) -> tuple[Mesh, list[Job]]:
    """The mesh and the programs of train.modules, or of train.encode.

    Raises:
        UserError, ValueError, FileNotFoundError: as those programs, but that weights and data need not be there.
    """
    if isinstance(config, EncodeConfig):
        mesh = make_mesh(config.mesh, slice.devices)
        return mesh, encode_jobs(config, mesh)
    mesh = make_mesh(config.mesh, slice.devices, TRAINING_AXES)
    config = divisible(config, mesh)
    drawing = [] if config.online is None else [rollout_job(config, mesh)]
    return mesh, [step_job(config, mesh), *drawing]


def candidates(config: TrainConfig | EncodeConfig, slice: str) -> list[list[str]]:
    """Flags to compare: fsdp axes of the hosts and of more chips, each with and without blocks computed again."""
    if isinstance(config, EncodeConfig):
        return [["--encoding.batch-size", str(size)] for size in (1, 2, 4, 8)]
    sizes = [size for size in (1, 4, 16, 64) if size <= chips_of(slice)]
    sizes = sizes if config.weights == "full" else sizes[:1]
    meshes = ["data=-1" if size == 1 else f"data=-1,fsdp={size}" for size in sizes]
    return [["--mesh", mesh, "--remat", remat] for mesh in meshes for remat in get_args(Remat)]


def divisible(config: TrainConfig, mesh: Mesh) -> TrainConfig:
    """The config with a batch, and a number of parts of it, that every chip has a share of; says where they differ.

    The batch becomes the next multiple of the chips, and the parts the most up to the config's own number.
    """
    chips = mesh.size // mesh.shape.get("tensor", 1)
    share = -(-config.batch_size // chips)
    parts = max(parts for parts in range(1, config.accumulation + 1) if share % parts == 0)
    size, asked = share * chips, (config.batch_size, config.accumulation)
    if (size, parts) == asked:
        return config
    name = "input.batch_size" if config.online is None else "online.rollouts.batch_size"
    print(
        f"planned with {name}={size} and accumulation={parts}: {asked[0]} in {asked[1]} parts cannot be divided over "
        f"{chips} chips"
    )
    if config.input is not None:
        return dataclasses.replace(config, input=dataclasses.replace(config.input, batch_size=size), accumulation=parts)
    assert config.online is not None  # a config has one of the two
    drawn = {"prompts": size, "at_once": size} if config.online.rollouts.update == "step" else {}
    rollouts = dataclasses.replace(config.online.rollouts, batch_size=size, **drawn)
    return dataclasses.replace(config, online=dataclasses.replace(config.online, rollouts=rollouts), accumulation=parts)


def step_job(config: TrainConfig, mesh: Mesh) -> Job:
    """The step that train.modules makes with this config on this mesh; errors as `jobs`.

    Of a set with pairs of several sizes it is the step for the largest, which takes the most memory and time.
    """
    family = describe(config)
    program, name = Program(config, mesh, family.unet), f"train step of {type(config.method).__name__}"
    if config.online is None:
        records = records_of(config, family)
        check_data(records, family.unet, config)
        if len(sizes := records.buckets()) > 1:
            records = largest(records)
            name += f", {size_text(records.image_size)} pixels, the largest of {len(sizes)} sizes"
        schedule = NoiseSchedule.from_dict(family.scheduler_config)
        objective = program.pair_objective(schedule, records.conditioning(EMPTY), family.vae.scaling_factor)
        batch = batch_of(config, records, mesh)
    else:
        objective, batch = program.online_objective(), examples_of(config, family, mesh)
    return Job(
        name=name,
        program=program.step(objective),
        arguments=(program.shapes, program.frozen, batch),
        held=held_by(program.shapes, program.frozen, batch) | judging_of(config, program),
        work=config.batch_size,
        unit="pair" if config.online is None else "example",
    )


def judging_of(config: TrainConfig, program: Program) -> dict[str, Any]:
    """Autoencoder and rewards of an online run, as shapes with shardings; rewards have their published sizes."""
    if config.online is None:
        return {}
    mesh, whole = program.mesh, NamedSharding(program.mesh, PartitionSpec())
    vae, reward = abstract_pipeline(config, program.dtype).vae.params, abstract_reward(config.online.rewards)
    return {
        "autoencoder": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), vae),
        "rewards": jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, piece_spec(x.shape, mesh))),
            reward,
        ),
    }


def rollout_job(config: TrainConfig, mesh: Mesh) -> Job:
    """How an online run draws and judges the prompts that it takes at once, with rewards as published."""
    method, online = config.method, config.online
    assert isinstance(method, OnlineMethod) and online is not None
    family, prompts = describe(config), online.rollouts.at_once
    program = Program(config, mesh, family.unet)
    vae = abstract_pipeline(config, program.dtype).vae
    whole, divided = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
    share = mesh.size // mesh.shape.get("tensor", 1)
    if prompts % share:
        prompts = -(-prompts // share) * share
        asked = online.rollouts.at_once
        print(f"planned with online.rollouts.at_once={prompts}: {asked} cannot be divided over {share} chips")
    solver = solver_from_config(family.scheduler_config, method.steps, name=method.solver_name, eta=method.eta)
    clean = clean_estimate(NoiseSchedule.from_dict(family.scheduler_config), np.asarray(solver.timesteps))
    height, width = (size // family.vae.downscale_factor for size in online.size)
    shape = (height, width, family.vae.latent_channels)

    def draw(params, frozen, vae_params, reward, solver, text, empty, of_prompts, *part):
        keys, prepared = of_prompts

        def judge(of_latents, latents):
            each = jax.tree.map(lambda x: jnp.repeat(x, len(latents) // len(x), axis=0), prepared)
            return of_latents(reward, vae._replace(params=vae_params), latents, each, sharding=divided)

        drawing = RolloutInputs(
            predict=program.trained.predict(params, frozen),
            solver=solver,
            clean=clean,
            keys=jax.random.wrap_key_data(keys, impl="threefry2x32"),
            text=text,
            empty=empty_for_each(empty, text),
            shape=shape,
            score=partial(judge, score_latents),
            ascent=partial(judge, score_gradients),
        )
        return method.draw_step(drawing, *part) if part and isinstance(method, StepPairs) else method.draw(drawing)

    def given(shape, dtype, sharding):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    told = conditioning_shapes(family.unet, family.text_encoders, sizes=True)
    text = {name: given((prompts, *each), program.dtype, divided) for name, each in told.items()}
    empty = {name: given(each, program.dtype, whole) for name, each in told.items()}
    rows = jax.tree.map(lambda x: given(x.shape, x.dtype, whole), solver)
    judging = judging_of(config, program)
    reward = judging["rewards"]
    prepared = jax.tree.map(lambda x: given(x.shape, x.dtype, divided), reward.prepare([""] * prompts))
    of_prompts = given((prompts, 2), jnp.uint32, divided), prepared
    part = ()
    if online.rollouts.update == "step":
        part = given((prompts, *shape), jnp.float32, divided), *(given((), jnp.int32, whole),) * 2
    params = program.shapes.params
    images = prompts * math.prod(method.examples[:-1])
    return Job(
        name="drawing of images" if not part else "drawing of a trained step",
        program=jax.jit(draw),
        arguments=(params, program.frozen, judging["autoencoder"], reward, rows, text, empty, of_prompts, *part),
        held=held_by(program.shapes, program.frozen, ()) | judging,
        work=images,
        unit="image",
    )


class Blank(Records):
    """Records of which only the shapes are known: one pair of zeros."""

    def __init__(self, shapes: Shapes, image_size: tuple[int, int]):
        self.shapes, self.image_size, self.fingerprint = shapes, image_size, "blank"

    def __len__(self) -> int:
        """Number of pairs."""
        return 1

    def pair(self, index: int) -> dict[str, np.ndarray]:
        """See `Records`."""
        moments = np.zeros(self.shapes.moments, jnp.bfloat16)
        sizes = np.zeros((len(moments), 2, 4), np.int32)
        numbers = {"row": np.asarray(0, np.int64), "caption": np.asarray(EMPTY, np.int64)}
        return {**numbers, "winner": moments, "loser": moments, "sizes": sizes}

    def conditioning(self, caption: int) -> dict[str, np.ndarray]:
        """See `Records`."""
        return {name: np.zeros(shape, jnp.bfloat16) for name, shape in self.shapes.conditioning.items()}


def records_of(config: TrainConfig, family: Family) -> Records:
    """The prepared set of a config where it is there, else one of the resolution that the networks were trained on."""
    if config.data is not None and config.data.exists():
        return PreparedSet(config.data)
    assert config.input is not None
    vae = family.vae
    side = family.resolution // vae.downscale_factor
    moments = (1 + config.input.flip, side, side, 2 * vae.latent_channels)
    return Blank(
        Shapes(moments, conditioning_shapes(family.unet, family.text_encoders, sizes=False)),
        (family.resolution, family.resolution),
    )


def largest(records: Records) -> Blank:
    """Records with the shapes of those pairs of a set whose size has the most pixels; of equal ones the longest."""
    size, pairs = max(records.buckets().items(), key=lambda bucket: (math.prod(bucket[0]), max(bucket[0]), bucket[0]))
    return Blank(records.shapes._replace(moments=records.pair(int(pairs[0]))["winner"].shape), size)


def batch_of(config: TrainConfig, records: Records, mesh: Mesh) -> Any:
    """Shapes of what `data.pipeline.PairBatches` yields."""
    assert config.input is not None
    one_row = dataclasses.replace(config.input, batch_size=1)
    example = host_batches(records, one_row, seed=0, rows=np.arange(1))[0]
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype, sharding=sharding), example
    )


def examples_of(config: TrainConfig, family: Family, mesh: Mesh) -> Any:
    """Shapes of the minibatches that `training.rollouts.Rollouts` gives."""
    method, online, vae = config.method, config.online, family.vae
    assert isinstance(method, OnlineMethod) and online is not None
    height, width = (size // vae.downscale_factor for size in online.size)
    shapes = {name: (1, *shape) for name, shape in method.shapes((height, width, vae.latent_channels)).items()}
    text = conditioning_shapes(family.unet, family.text_encoders, sizes=True)
    solver = solver_from_config(family.scheduler_config, method.steps, name=method.solver_name, eta=method.eta)

    def one():
        zeros = {name: jnp.zeros(shape) for name, shape in shapes.items()}
        told = {name: jnp.zeros((1, *shape)) for name, shape in text.items()}
        empty = {name: jnp.zeros(shape) for name, shape in text.items()}
        index = [jnp.zeros(1, jnp.int32) for _ in range(1 + len(method.examples))]
        return take_batch(method, zeros, told, empty, (solver, jnp.ones(method.steps)), index, index[-1])

    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype, sharding=sharding),
        jax.eval_shape(one),
    )


def encode_jobs(config: EncodeConfig, mesh: Mesh) -> list[Job]:
    """What train.encode does with a batch of pairs, and with one of captions; errors as `jobs`."""
    with jax.set_mesh(mesh):
        dtype = jnp.dtype(default_dtype(config.dtype))
    pipeline = abstract_pipeline(config, dtype)
    whole = NamedSharding(mesh, PartitionSpec())
    divided = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def placed(network):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), network.params)

    vae, encoders = placed(pipeline.vae), [placed(network) for network in pipeline.text_encoders]
    held = {"autoencoder": vae, "text encoders": encoders}
    pairs, captions = (count * mesh.size for count in (config.encoding.batch_size, CAPTIONS_AT_ONCE))
    sizes = config.encoding.sizes
    size, name = max(sizes, key=lambda size: (math.prod(size), max(size), size)), "encoding of images"
    if len(sizes) > 1:
        name += f", {size_text(size)} pixels, the largest of {len(sizes)} sizes"
    pixels = jax.ShapeDtypeStruct((pairs, 2, *size, 3), jnp.uint8, sharding=divided)

    def encode(params, pixels):
        return pixel_encoder(pipeline.vae.graphdef, config.encoding.mirrored, params, pixels)

    def caption(params, ids):
        own = [network._replace(params=each) for network, each in zip(pipeline.text_encoders, params, strict=True)]
        return encode_ids(dataclasses.replace(pipeline, text_encoders=tuple(own)), ids)

    length = pipeline.text_encoders[0].config.max_position_embeddings
    ids = [jax.ShapeDtypeStruct((captions, length), jnp.int32, sharding=divided) for _ in encoders]
    return [
        Job("captions", jax.jit(caption), (encoders, ids), held, captions, "caption", "text encoders"),
        Job(name, jax.jit(encode), (vae, pixels), {**held, "batch": pixels}, pairs, "pair", "VAE"),
    ]
