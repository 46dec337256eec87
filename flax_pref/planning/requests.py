"""Plans of training, encoding and sampling, as the programs ask for them."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flax_pref.checkpoints.abstract import abstract_pipeline
from flax_pref.data.preparation import EncodeConfig
from flax_pref.diffusion.drawing import Drawing, resolve_drawing
from flax_pref.diffusion.drawing_flags import with_preset
from flax_pref.models.bank import AXIS
from flax_pref.models.network import with_attention
from flax_pref.models.platform import default_dtype
from flax_pref.parallel.mesh import make_mesh
from flax_pref.planning import training
from flax_pref.planning.command import compare, show
from flax_pref.planning.plan import Job
from flax_pref.planning.plan_flags import PlanFlags, SamplingPlanFlags
from flax_pref.planning.sampling import drawing_jobs, with_adapters
from flax_pref.planning.topologies import Topology, chips_of
from flax_pref.training.trainer import TrainConfig


def plan_training(flags: PlanFlags, config: TrainConfig | EncodeConfig, arguments: Sequence[str]) -> None:
    """Prints the plan of a training step or of encoding, or a table of several plans.

    Args:
        flags: of the plan.
        config: of the run.
        arguments: those that flags and config were read from; plans in processes of their own are made from them.

    Raises:
        UserError, ValueError, FileNotFoundError: the slice or the run cannot be.
    """
    if flags.compare:
        print(compare("plan", arguments, training.candidates(config, flags.topology)))
    else:
        show(flags, "plan", arguments, partial(training.jobs, config))


def plan_sampling(flags: SamplingPlanFlags, arguments: Sequence[str]) -> None:
    """Prints the plan of a sampler, or a table of several plans; arguments and errors as `plan_training`."""
    flags = with_preset(flags)
    drawing = resolve_drawing(flags, weights=False)
    if flags.compare:
        print(compare("plan-sample", arguments, _candidates(flags, drawing)))
    else:
        show(flags, "plan-sample", arguments, partial(_jobs, flags, drawing))


def _candidates(flags: SamplingPlanFlags, drawing: Drawing) -> list[list[str]]:
    """Flags to compare: images at a time, and for full weights with and without networks side by side."""
    meshes = ["data=-1"]
    if flags.weights == "full" and not flags.merge:
        count = len({"base", *drawing.sampled.networks()})
        sizes = [size for size in range(count, 2 * count) if chips_of(flags.topology) % size == 0]
        meshes += [f"{AXIS}={sizes[0]},data=-1"] if count > 1 and sizes else []
    return [["--mesh", mesh, "--batch-size", str(size)] for mesh in meshes for size in (1, 2, 4)]


def _jobs(flags: SamplingPlanFlags, drawing: Drawing, slice: Topology) -> tuple[Mesh, list[Job]]:
    """The mesh and the programs of a sampler."""
    mesh = make_mesh(flags.mesh, slice.devices)
    with jax.set_mesh(mesh):
        dtype = jnp.dtype(default_dtype(flags.dtype))
    pipeline = abstract_pipeline(flags, dtype)
    base = with_attention(pipeline.unet, flags.attention)
    names = [name for name in drawing.sampled.networks() if name != "base"]
    modules = dict.fromkeys(names, base) if flags.weights == "full" else {}
    if names and not modules:
        base = with_adapters(base, names, flags.rank)
    return mesh, drawing_jobs(
        dataclasses.replace(pipeline, unet=base),
        modules,
        drawing.sampled,
        drawing.solver,
        mesh,
        size=drawing.size,
        batch_size=flags.batch_size * (mesh.size // mesh.shape.get(AXIS, 1)),
    )
