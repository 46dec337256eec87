"""Plans sampling for a TPU slice that is not there.

    python -m sample.plan --model demo --rule cpgd --w 4 --steps 25 --topology v5e:2x2

Takes the flags of sample.images that have a meaning without images, but for modules: of those that the rule names,
`--weights` says what they are. docs/planning.md says what the figures are, and what they are not.
"""

import dataclasses
import os
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flax_pref.checkpoints.abstract import abstract_pipeline
from flax_pref.config import UserError, parse_flags, run_main
from flax_pref.diffusion.rules import named_rule
from flax_pref.models.bank import AXIS
from flax_pref.models.network import with_attention
from flax_pref.models.platform import default_dtype
from flax_pref.parallel.mesh import make_mesh
from flax_pref.planning.command import PlanFlags, compare, show
from flax_pref.planning.plan import Job
from flax_pref.planning.sampling import drawing_jobs, with_adapters
from flax_pref.planning.topologies import Topology, chips_of
from sample.options import Drawing, check_drawing, drawn_terms, size_of, solver_of, with_preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PlanFlags, Drawing):
    """Plans sampling for a TPU slice that is not there."""

    weights: Literal["lora", "full"] = "lora"
    """Of the modules that the rule names: adapters of the base, or networks of their own."""
    rank: int = 16
    """Of adapters."""
    mesh: str = "data=-1"
    """How to use the devices: data=-1 shares out the images, network=4,data=-1 puts base and modules with full weights
    on different devices too, of which one is idle where they are three."""

    def __post_init__(self):
        super().__post_init__()
        chips_of(self.topology)
        if self.rank < 1:
            raise UserError(f"--rank {self.rank}: expected at least 1")


def main(arguments: list[str]) -> None:
    """Prints the plan, or a table of several."""
    config = with_preset(parse_flags(arguments, Config))
    if config.module or config.module_base:
        raise UserError("--module: no weights are read; --weights lora or full says what the rule's modules are")
    if config.quantize is not None:
        raise UserError(f"--quantize {config.quantize}: plans are of weights in --dtype only; leave the flag out")
    check_drawing(config, config.model, {})
    if config.compare:
        print(compare("sample.plan", arguments, candidates(config)))
    else:
        show(config, "sample.plan", arguments, partial(jobs, config))


def candidates(config: Config) -> list[list[str]]:
    """Flags to compare: images at a time, and for full weights with and without networks side by side."""
    meshes = ["data=-1"]
    if config.weights == "full" and not config.merge:
        count = len({"base", *named_rule(**drawn_terms(config)).networks()})
        sizes = [size for size in range(count, 2 * count) if chips_of(config.topology) % size == 0]
        meshes += [f"{AXIS}={sizes[0]},data=-1"] if count > 1 and sizes else []
    return [["--mesh", mesh, "--batch-size", str(size)] for mesh in meshes for size in (1, 2, 4)]


def jobs(config: Config, slice: Topology) -> tuple[Mesh, list[Job]]:
    """The mesh and the programs of sample.images."""
    mesh = make_mesh(config.mesh, slice.devices)
    with jax.set_mesh(mesh):
        dtype = jnp.dtype(default_dtype(config.dtype))
    pipeline = abstract_pipeline(config.model, dtype)
    base, rule = with_attention(pipeline.unet, config.attention), named_rule(**drawn_terms(config))
    names = [name for name in rule.networks() if name != "base"]
    modules = dict.fromkeys(names, base) if config.weights == "full" else {}
    if names and not modules:
        base = with_adapters(base, names, config.rank)
    pipeline = dataclasses.replace(pipeline, unet=base)
    size = size_of(pipeline.unet.config, pipeline.vae.config, config)
    shards = mesh.size // mesh.shape.get(AXIS, 1)
    return mesh, drawing_jobs(
        pipeline,
        modules,
        rule,
        solver_of(pipeline.scheduler_config, Path(config.model), config),
        mesh,
        size=size,
        batch_size=config.batch_size * shards,
    )


if __name__ == "__main__":
    status = run_main(main)
    sys.stdout.flush()
    os._exit(status)  # the compiler may still be busy, see `planning.plan.laid_out`
