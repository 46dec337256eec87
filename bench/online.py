"""The loss of DiffusionNFT with random weights, beside its parts: what predicting three policies at once costs.

The new policy is predicted with gradients, the old one and the reference without, in one pass of two rows. In turns
with the step: the new policy alone, the other two alone, and all three in one pass, through which gradients are
computed for constants too.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bench.common import each_round, family_of, medians, random_inputs, random_network, time_in_turns
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.methods import DiffusionNFT
from flax_pref.models.lora import BASE
from flax_pref.models.network import with_remat
from flax_pref.models.platform import default_dtype
from flax_pref.models.presets import Family
from flax_pref.models.remat import Remat
from flax_pref.parallel.peak import step_flops
from flax_pref.training.networks import LoRA, trained_networks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Online:
    """Times the loss of DiffusionNFT and its gradient, and the predictions that it is made of."""

    family: Literal["sd15", "sdxl"] = "sd15"
    unet: Path | None = None
    """config.json of another UNet that takes the place of the family's."""
    rank: int = 16
    """Rank of the adapters."""
    batch_size: int = 1
    """Images in the batch."""
    size: int | None = None
    """Side of the images in pixels (default: the family's own)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype that networks compute in; auto is bfloat16 on TPUs and GPUs, float32 on CPUs."""
    remat: Remat = "none"
    """Recompute activations in the backward pass, block by block, or keep them."""
    rounds: int = 3
    """Timed steps of each; the median counts."""
    parts: bool = True
    """Also time its parts, and all of them in one pass."""
    json: Path | None = None
    """File for the figures."""


def bench_online(bench: Online) -> dict:
    """Seconds and work of the step and of its parts, and their ratios."""
    if bench.batch_size < 1:
        raise ValueError(f"bench: --batch-size {bench.batch_size}; expected at least one image")
    method, (family, size) = DiffusionNFT(), family_of(bench.family, bench.unet, bench.size)
    base = with_remat(random_network("unet", family.unet, default_dtype(bench.dtype)), bench.remat)
    trained, begin = trained_networks(base, method.modules, "lora", LoRA(rank=bench.rank), old=method.old)
    new = jax.jit(begin)(base.params, jax.random.key(0))
    batch, constant = examples(family, size, bench.batch_size, method), (method.old, BASE)

    def predicted(predict, batch, networks):
        inputs = jnp.stack([batch["clean"]] * len(networks), axis=1)
        text = jax.tree.map(lambda x: jnp.stack([x] * len(networks), axis=1), batch["text"])
        return predict(networks, inputs, batch["row"].timesteps, text)

    def step(new, old, frozen, batch):
        return method.loss(trained.predict(new, frozen, old), batch, jax.random.key(1))[0]

    def policy(new, old, frozen, batch):
        return jnp.square(predicted(trained.predict(new, frozen), batch, method.modules)).mean()

    def constants(new, old, frozen, batch):
        return predicted(trained.predict(new, frozen, old), batch, constant)

    def in_one_pass(new, old, frozen, batch):
        rows = predicted(trained.predict(new, frozen, old), batch, (*method.modules, *constant))
        return jnp.square(rows[:, :1] - jax.lax.stop_gradient(rows[:, 1:])).mean()

    programs = {
        "step": jax.grad(step),
        "new policy": jax.grad(policy),
        "old policy and reference": constants,
        "all in one pass": jax.grad(in_one_pass),
    }
    arguments = new, new, base.params, batch  # the old policy as before the first update
    compiled = {name: jax.jit(program) for name, program in programs.items() if bench.parts or name == "step"}
    calls = {
        name: lambda program=program: jax.block_until_ready(program(*arguments)) for name, program in compiled.items()
    }
    times = time_in_turns(calls, bench.rounds)
    seconds = medians(times)
    figures = {
        **{"family": bench.family, "size": 8 * size, "batch_size": bench.batch_size},
        **{"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rounds": bench.rounds},
        "seconds": {name: round(value, 5) for name, value in seconds.items()},
        "gflop": {name: round(step_flops(program, *arguments) / 1e9, 3) for name, program in compiled.items()},
        "each_round": each_round(times),
    }
    if bench.parts:
        parts = seconds["new policy"] + seconds["old policy and reference"]
        figures["step_to_parts"] = round(seconds["step"] / parts, 3)
        figures["one_pass_to_step"] = round(seconds["all in one pass"] / seconds["step"], 3)
    return figures


def examples(family: Family, size: int, count: int, method: DiffusionNFT) -> dict[str, Any]:
    """A batch of the method, of random numbers; `size` in latent pixels."""
    inputs = random_inputs(family, count, size)
    clean = inputs.pop("latents")
    del inputs["timesteps"]
    solver = solver_from_config(family.scheduler_config, method.steps, name=method.solver_name)
    row = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x[3:4]), count, axis=0), solver)
    signal = NoiseSchedule.from_dict(family.scheduler_config).alphas_cumprod[np.asarray(row.timesteps, int)]
    numbers = dict.fromkeys(("advantage", "reward"), np.ones(count, np.float32))
    return {"clean": clean, "text": inputs, "row": row, "signal": signal.astype(np.float32), **numbers}
