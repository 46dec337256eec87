"""One forward pass of the UNet as the compiler of TPUs makes it, on a machine without one."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from bench.common import random_inputs
from bench.guidance import MODULES, RULES
from flax_pref.checkpoints.weights import abstract_network
from flax_pref.diffusion.guidance import tabulate
from flax_pref.models.attention import Kernel
from flax_pref.models.lora import bank_predict, project_text
from flax_pref.models.network import Network, with_attention
from flax_pref.models.presets import FAMILIES, Family
from flax_pref.parallel.mesh import make_mesh
from flax_pref.planning.hlo import Module
from flax_pref.planning.kernels import PALLAS, kernel_cost
from flax_pref.planning.plan import code_bytes, compiled, laid_out, large_copies, modelled
from flax_pref.planning.plan_flags import Effort
from flax_pref.planning.sampling import with_adapters
from flax_pref.planning.topologies import topology

UNPRICED = 0.3  # share of what a copy takes by its bytes, below which the compiler's estimate is none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """Compiles one forward pass of the UNet for a TPU slice that is not there; needs libtpu."""

    topology: str = "v5e:2x2"
    family: Literal["sd15", "sdxl"] = "sd15"
    images_per_chip: int = 2
    rule: Literal["none", "cfg", "cpgd"] = "none"
    """none: an image is a row of the batch. Others: the rows of a guidance rule for each image, with keys and values of
    its prompts as arguments, as in a step of the sampler; cpgd with two modules of rank 16."""
    attention: Kernel = "auto"
    effort: Effort = "full"
    """full: machine code and the compiler's own estimate, in minutes. quick: memory layout and our model alone."""
    json: Path | None = None
    """File for the figures."""


def bench_forward(bench: Forward) -> dict:
    """Estimated cycles and memory of a chip, and the copies that change a layout."""
    slice, family = topology(bench.topology), FAMILIES[bench.family]
    mesh = make_mesh("data=-1", slice.devices)
    network = with_attention(abstract_network("unet", family.unet, jnp.bfloat16), bench.attention)
    images = bench.images_per_chip * mesh.size
    forward_pass, network, inputs = rows_of_a_rule(network, family, bench.rule, images)
    whole, divided = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))

    def placed(tree, sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    arguments = placed(network.params, whole), placed(inputs, divided)
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
        **{"rule": bench.rule, "attention": bench.attention, "jax": jax.__version__},
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


def rows_of_a_rule(network: Network, family: Family, rule: str, images: int) -> tuple[Callable, Network, Any]:
    """A forward pass of parameters and inputs, the network with the rule's modules, and the inputs or their shapes."""
    size = family.resolution // 8
    if rule == "none":
        return (
            lambda params, inputs: nnx.merge(network.graphdef, params)(**inputs),
            network,
            random_inputs(family, images, size),
        )
    rows = tuple(name for name, _ in tabulate(RULES[rule], 1, 1).rows)
    if rule != "cfg":
        network = with_adapters(network, MODULES, 16)
    inputs = random_inputs(family, images * len(rows), size)
    latents, text = jax.tree.map(
        lambda x: x.reshape(images, len(rows), *x.shape[1:]),
        (inputs.pop("latents"), {name: array for name, array in inputs.items() if name != "timesteps"}),
    )
    text = jax.eval_shape(lambda params, text: project_text(network.graphdef, params, rows, text), network.params, text)

    def forward_pass(params, inputs):
        return bank_predict(network.graphdef, params)(rows, *inputs)

    return forward_pass, network, (latents, inputs["timesteps"][:images], text)
