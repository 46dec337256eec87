"""One forward pass of the UNet as the compiler of TPUs makes it, on a machine without one."""

import dataclasses
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from bench.common import random_inputs
from flax_pref.checkpoints.weights import abstract_network
from flax_pref.models.attention import Kernel
from flax_pref.models.network import with_attention
from flax_pref.models.presets import FAMILIES
from flax_pref.parallel.mesh import make_mesh
from flax_pref.planning.hlo import Module
from flax_pref.planning.kernels import PALLAS, kernel_cost
from flax_pref.planning.plan import code_bytes, compiled, laid_out, large_copies, modelled
from flax_pref.planning.plan_flags import Effort
from flax_pref.planning.topologies import topology

UNPRICED = 0.3  # share of what a copy takes by its bytes, below which the compiler's estimate is none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """Compiles one forward pass of the UNet for a TPU slice that is not there; needs libtpu."""

    topology: str = "v5e:2x2"
    family: Literal["sd15", "sdxl"] = "sd15"
    images_per_chip: int = 2
    attention: Kernel = "auto"
    effort: Effort = "full"
    """full: machine code and the compiler's own estimate, in minutes. quick: memory layout and our model alone."""
    json: Path | None = None
    """File for the figures."""


def bench_forward(bench: Forward) -> dict:
    """Estimated cycles and memory of a chip, and the copies that change a layout."""
    slice, family = topology(bench.topology), FAMILIES[bench.family]
    mesh = make_mesh("data=-1", slice.devices)
    _, graphdef, params = with_attention(abstract_network("unet", family.unet, jnp.bfloat16), bench.attention)
    whole, divided = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))

    def placed(tree, sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    inputs = random_inputs(family, bench.images_per_chip * mesh.size, family.resolution // 8)
    arguments = placed(params, whole), placed(inputs, divided)

    def forward_pass(params, inputs):
        return nnx.merge(graphdef, params)(**inputs)

    program = jax.jit(forward_pass, out_shardings=divided)
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = program.lower(*arguments)
        text, memory = laid_out(lowered, arguments) if bench.effort == "quick" else compiled(lowered)
    seconds = time.perf_counter() - started
    executed = list(Module(text, slice.chip.mxu).executed(lambda one, operands: kernel_cost(one, operands, slice)))
    kernels = [one for one in executed if one.instruction.target == PALLAS]
    copies = [one for one in executed if one.instruction.opcode in ("copy", "transpose")]
    model = sum(modelled(one, slice).cycles for one in executed if one.instruction.target != PALLAS)
    cycles = sum(one.cost.cycles for one in kernels)
    told, code = {}, code_bytes(executed)
    if bench.effort == "full":
        # Of some copies the compiler notes a token number instead of an estimate.
        priced = [(modelled(one, slice).cycles, one.cost.cycles) for one in copies]
        missing = sum(model - noted for model, noted in priced if noted < UNPRICED * model)
        told = {
            "million_cycles_outside_kernels": round((sum(one.cost.cycles for one in executed) - cycles) / 1e6, 2),
            "million_cycles_of_copies_without_estimate": round(missing / 1e6, 2),
        }
        code = memory.generated_code_size_in_bytes
    return {
        **{"family": bench.family, "topology": bench.topology, "images_per_chip": bench.images_per_chip},
        **{"attention": bench.attention, "jax": jax.__version__},
        **told,
        "million_cycles_outside_kernels_by_the_quick_model": round(model / 1e6, 2),
        "million_cycles_of_kernels": round(cycles / 1e6, 2),
        "million_cycles_of_matrix_units": round(
            sum(one.cost.flops for one in executed) / slice.peak * slice.chip.clock / 1e6, 2
        ),
        "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 3),
        "program_mb": round(code / 1e6, 1),
        "large_copies": large_copies(executed),
        "compile_seconds": round(seconds, 1),
    }
