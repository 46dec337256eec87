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

from bench.common import random_inputs, random_network, time_in_turns
from flax_pref.checkpoints.lora import lora_network
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.solvers import solver_from_config
from flax_pref.files import read_json
from flax_pref.methods import DiffusionNFT
from flax_pref.models.bank import Bank, Member
from flax_pref.models.lora import BASE, join_lora, split_lora
from flax_pref.models.network import with_attention, with_remat
from flax_pref.models.platform import default_dtype
from flax_pref.models.presets import FAMILIES
from flax_pref.models.remat import Remat
from flax_pref.models.unet import UNetConfig
from flax_pref.parallel.peak import step_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Online:
    """Times the loss of DiffusionNFT and its gradient, and the predictions that it is made of."""

    family: Literal["sd15", "sdxl"] = "sd15"
    unet: Path | None = None
    """config.json of another UNet that takes the place of the family's."""
    rank: int = 16
    """Of the adapters."""
    batch_size: int = 1
    """Images."""
    size: int | None = None
    """Side of the images in pixels (default: the family's own)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the network computes in; auto: bfloat16 on TPUs and GPUs, float32 on CPUs."""
    remat: Remat = "none"
    """What is computed again in the backward pass instead of kept."""
    rounds: int = 3
    """Timed steps of each; the median counts."""
    json: Path | None = None
    """File for the figures."""


def bench_online(bench: Online) -> dict:
    """Seconds and work of the step and of its parts, and their ratios."""
    if bench.batch_size < 1:
        raise ValueError(f"bench: --batch-size {bench.batch_size}; expected at least one image")
    family, method = FAMILIES[bench.family], DiffusionNFT()
    if bench.unet is not None:
        family = family._replace(unet=UNetConfig.from_dict(read_json(bench.unet, expected="a config.json of a UNet")))
    assert method.old is not None
    names = (*method.modules, method.old)
    network = with_attention(random_network("unet", family.unet, default_dtype(bench.dtype)), "auto")
    adapted = lora_network(network, names, rank=bench.rank, alpha=float(bench.rank), key=jax.random.key(0))
    adapted = with_remat(adapted, bench.remat)
    frozen, lora = split_lora(adapted.params)
    batch = examples(family, bench, method)

    def predicting(lora: Any, frozen: Any) -> Bank:
        old = jax.tree.map(lambda x: jnp.concatenate([x[:1], jax.lax.stop_gradient(x[1:])]), lora)
        return Bank((Member(BASE, adapted.graphdef, join_lora(frozen, old)),))

    def predicted(lora, frozen, batch, networks):
        inputs, text = (jax.tree.map(lambda x: jnp.stack([x] * len(networks), axis=1), x) for x in
                        (batch["clean"], batch["text"]))  # fmt: skip
        return predicting(lora, frozen)(networks, inputs, batch["row"].timesteps, text)

    def step(lora, frozen, batch):
        return method.loss(predicting(lora, frozen), batch, jax.random.key(1))[0]

    def in_one_pass(lora, frozen, batch):
        """The same sums of one prediction of three rows."""
        rows = predicted(lora, frozen, batch, (*names, BASE))
        new, old, reference = rows[:, 0], *(jax.lax.stop_gradient(rows[:, k]) for k in (1, 2))
        return jnp.square(new - old).mean() + jnp.square(new - reference).mean()

    def policy(lora, frozen, batch):
        return jnp.square(predicted(lora, frozen, batch, method.modules)).mean()

    def constants(lora, frozen, batch):
        return predicted(lora, frozen, batch, (method.old, BASE))

    programs = {
        "step": jax.grad(step),
        "new policy": jax.grad(policy),
        "old policy and reference": constants,
        "all in one pass": jax.grad(in_one_pass),
    }
    compiled = {name: jax.jit(program) for name, program in programs.items()}
    calls = {
        name: lambda program=program: jax.block_until_ready(program(lora, frozen, batch))
        for name, program in compiled.items()
    }
    seconds = time_in_turns(calls, bench.rounds)
    parts = seconds["new policy"] + seconds["old policy and reference"]
    return {
        **{"family": bench.family, "size": 8 * batch["clean"].shape[1], "batch_size": bench.batch_size},
        **{"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rounds": bench.rounds},
        "seconds": {name: round(value, 5) for name, value in seconds.items()},
        "gflop": {name: round(step_flops(program, lora, frozen, batch) / 1e9, 3) for name, program in compiled.items()},
        "step_to_parts": round(seconds["step"] / parts, 3),
        "one_pass_to_step": round(seconds["all in one pass"] / seconds["step"], 3),
    }


def examples(family, bench: Online, method: DiffusionNFT) -> dict[str, Any]:
    """A batch of the method, of random numbers."""
    size = (bench.size or family.resolution) // 8
    inputs = random_inputs(family, bench.batch_size, size)
    clean = inputs.pop("latents")
    del inputs["timesteps"]
    solver = solver_from_config(family.scheduler_config, method.steps, name=method.solver_name)
    row = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x[3:4]), bench.batch_size, axis=0), solver)
    signal = NoiseSchedule.from_dict(family.scheduler_config).alphas_cumprod[np.asarray(row.timesteps, int)]
    numbers = {"advantage": np.ones(bench.batch_size, np.float32), "reward": np.ones(bench.batch_size, np.float32)}
    return {"clean": clean, "text": inputs, "row": row, "signal": signal.astype(np.float32), **numbers}
