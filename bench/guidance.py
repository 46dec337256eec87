"""One sampling step under each guidance rule, with adapters of random weights, and the same step in torch.

The networks of a rule share one backbone and one batch: six predictions should cost three times what two cost.
"""

import dataclasses
import functools
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from bench.common import (
    Reached,
    bytes_accessed,
    each_round,
    family_of,
    medians,
    memory_peak_gb,
    random_inputs,
    random_network,
    time_in_turns,
)
from flax_pref.checkpoints.lora import lora_network
from flax_pref.checkpoints.weights import to_stored
from flax_pref.diffusion.guidance import Rule, cfg, cpgd, cpgd_conditional, pgd, tabulate
from flax_pref.diffusion.sampler import image_keys, sample
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.solvers import Solver
from flax_pref.models.attention import Kernel
from flax_pref.models.bank import Bank, Member
from flax_pref.models.lora import BASE, DEFAULT_TARGETS, join_lora, split_lora
from flax_pref.models.network import Network, with_attention
from flax_pref.models.platform import default_dtype
from flax_pref.models.presets import Family
from flax_pref.models.tree import flatten_dict
from flax_pref.parallel.peak import peak_of, step_flops

MODULES = ("pos", "neg")
RULES = {
    "cfg": cfg(7.5),
    "pgd": pgd(2.0, 7.5, "pos"),
    "cpgd_conditional": cpgd_conditional(2.0, 7.5),
    "cpgd": cpgd(2.0, 7.5),
}
STEPS_PER_IMAGE = 50  # of the images per second that are told


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """Times one sampling step under each guidance rule."""

    family: Literal["sd15", "sdxl"] = "sd15"
    unet: Path | None = None
    """config.json of another UNet that takes the place of the family's."""
    size: int | None = None
    """Side of the images in pixels; None: the family's own."""
    batch_size: int = 1
    """Images; each has as many rows as its rule needs."""
    rank: int = 16
    """Of the adapters of both modules."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the network computes in; auto: bfloat16 on TPUs and GPUs, float32 on CPUs."""
    attention: Kernel = "auto"
    rules: tuple[Literal["cfg", "pgd", "cpgd_conditional", "cpgd"], ...] = ("cfg", "cpgd")
    """What to time; cfg, which has no adapters, is always there to compare with."""
    steps: int | None = None
    """Steps of a timed call; None: 1 on CPUs, 10 elsewhere."""
    rounds: int | None = None
    """Timed calls of each, in turns; the median counts. None: 3 on CPUs, 10 elsewhere."""
    reference: bool = True
    """Also time cPGD as one call of diffusers' UNet after another with adapters switched between, in torch, where
    diffusers and peft are installed (on CPUs and CUDA GPUs)."""
    torch_compile: bool | None = None
    """Through torch.compile; None: on GPUs."""
    json: Path | None = None
    """File for the figures."""


def bench_guidance(bench: Guidance) -> dict:
    """Seconds, work and memory of a step under each rule, and seconds of cPGD in torch."""
    if bench.batch_size < 1:
        raise ValueError(f"bench: --batch-size {bench.batch_size}; expected at least one image")
    family, size = family_of(bench.family, bench.unet, bench.size)
    dtype, on_cpu = default_dtype(bench.dtype), jax.default_backend() == "cpu"
    steps, rounds = (
        given if given is not None else default
        for given, default in ((bench.steps, 1 if on_cpu else 10), (bench.rounds, 3 if on_cpu else 10))
    )
    solver = solver_from_config(family.scheduler_config, steps, name="ddim")
    inputs = sampler_inputs(family, bench.batch_size, size)
    plain = with_attention(random_network("unet", family.unet, dtype), bench.attention)
    adapted = with_adapters(plain, bench.rank)
    adapter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(split_lora(adapted.params)[1]))
    device = jax.devices()[0]
    peak, peak_is = peak_of(device, dtype)
    reached = Reached.measured(dtype)

    rows, moved, candidates, outputs, peaks = {}, {}, {}, {}, {}
    for name in dict.fromkeys(("cfg", *bench.rules)):
        network, rule = plain if name == "cfg" else adapted, RULES[name]
        program = sampler(network, rule, solver, bench.batch_size, size)
        started = time.perf_counter()
        compiled = program.lower(network.params, *inputs).compile()
        memory = compiled.memory_analysis()
        # XLA counts the body of a loop once: that is one step of the sampler.
        counted = sampler(with_attention(network, "xla"), rule, solver, bench.batch_size, size)
        rows[name] = {
            "predictions": tabulate(rule, 1, 1).evaluations * bench.batch_size,
            "compile_seconds": round(time.perf_counter() - started, 2),
            "gflop_per_step": step_flops(counted, network.params, *inputs) / 1e9,
            "argument_bytes": memory.argument_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
        }
        moved[name] = bytes_accessed(compiled)

        def call(name=name, compiled=compiled, params=network.params):
            outputs[name] = compiled(params, *inputs).block_until_ready()
            peaks.setdefault(name, memory_peak_gb())  # after the first call, before those of larger rules

        candidates[name] = call
    wanted = bench.reference and "cpgd" in rows
    compiled_torch = bench.torch_compile if bench.torch_compile is not None else not on_cpu
    reference = torch_sampler(family, adapted, solver, inputs, size, compiled=compiled_torch) if wanted else None
    if reference is not None:

        def call_reference():
            outputs["torch"] = reference()

        candidates["torch"] = call_reference
    times = each_round(time_in_turns(candidates, rounds), steps)
    seconds = medians(times)

    for name, row in rows.items():
        row["peak_memory_gb"] = round(peaks[name], 2)
        row["step_seconds"] = round(seconds[name], 5)
        row["images_per_second"] = round(bench.batch_size / (STEPS_PER_IMAGE * seconds[name]), 5)
        row["share_of_peak"] = peak and round(1e9 * row["gflop_per_step"] / seconds[name] / peak, 3)
        row |= reached.shares(1e9 * row["gflop_per_step"], moved[name], seconds[name])
        row["ratio_to_cfg"] = round(seconds[name] / seconds["cfg"], 3)
        row["temp_ratio_to_cfg"] = round(row["temp_bytes"] / rows["cfg"]["temp_bytes"], 3)
        row["argument_bytes_above_cfg"] = row["argument_bytes"] - rows["cfg"]["argument_bytes"]
        row["gflop_per_step"] = round(row["gflop_per_step"], 6)
    figures = {
        **{"family": bench.family, "size": 8 * size, "batch_size": bench.batch_size, "rank": bench.rank},
        **{"dtype": dtype, "device": device.device_kind, "jax": jax.__version__, "attention": bench.attention},
        **{"steps": steps, "rounds": rounds, "steps_per_image": STEPS_PER_IMAGE},
        **{"peak_tflops": peak and round(peak / 1e12, 3), "peak_is": peak_is, **reached.figures()},
        **{"parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(plain.params))},
        **{"adapter_bytes": adapter_bytes, "rules": rows, "each_round": times},
    }
    if "torch" in outputs:
        difference = np.abs(np.asarray(outputs["cpgd"]) - outputs["torch"]).max() / np.abs(outputs["torch"]).max()
        figures["torch"] = {
            "compiled": compiled_torch,
            "step_seconds": round(seconds["torch"], 5),
            "cpgd_ratio_to_torch": round(seconds["cpgd"] / seconds["torch"], 3),
            "largest_relative_difference": float(f"{difference:.1e}"),
        }
    return figures


def with_adapters(network: Network, rank: int) -> Network:
    """The network with two modules, none of whose matrices is zero."""
    bank = lora_network(network, MODULES, rank=rank, alpha=rank, key=jax.random.key(0))
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        if path[-1].key == "lora_a":
            return leaf
        return jax.numpy.asarray(0.1 * rng.standard_normal(leaf.shape, dtype=np.float32), leaf.dtype)

    lora = jax.tree_util.tree_map_with_path(draw, split_lora(bank.params)[1])
    return bank._replace(params=join_lora(network.params, lora))


def sampler_inputs(family: Family, batch_size: int, size: int) -> tuple[jax.Array, dict, dict]:
    """Keys, conditioning on prompts and on none, for `sample`; `size` in latent pixels."""
    inputs = random_inputs(family, 2 * batch_size, size)
    conditioning = {name: array for name, array in inputs.items() if name not in ("latents", "timesteps")}
    text, empty = (jax.tree.map(lambda x, part=part: x[part::2], conditioning) for part in (0, 1))
    return image_keys(0, range(batch_size)), text, empty


def sampler(network: Network, rule: Rule, solver: Solver, batch_size: int, size: int) -> Any:
    """`sample` under a rule, of parameters and `sampler_inputs`; what else it reads are constants."""
    table = tabulate(rule, len(solver.timesteps), batch_size)
    shape = (size, size, network.config.in_channels)

    def draw(params, keys, text, empty):
        bank = Bank((Member(BASE, network.graphdef, params),))
        return sample(bank, table, solver, keys, text, empty, shape)

    return jax.jit(draw)


# ----------------------------------------------------------------------------------------------------------------------
# Torch


def torch_sampler(
    family: Family, network: Network, solver: Solver, inputs: tuple[Any, ...], size: int, *, compiled: bool
) -> Callable[[], np.ndarray] | None:
    """The steps of cPGD from the same noise in diffusers and peft, one prediction after another.

    Args:
        family: of the network.
        network: with the adapters of `with_adapters`.
        solver: DDIM.
        inputs: of `sampler_inputs`.
        size: in latent pixels.
        compiled: the UNet goes through torch.compile.

    Returns:
        A function that gives the latents `[B, H, W, C]`, or None where torch, diffusers or peft cannot be had for this
        device. Its first call builds the network.
    """
    try:
        import torch
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler
        from peft import LoraConfig  # noqa: F401 (diffusers needs it for adapters)
    except ImportError:
        torch = DDIMScheduler = None
    on = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    if torch is None or DDIMScheduler is None or on is None or (on == "cuda" and not torch.cuda.is_available()):
        print("no torch with diffusers and peft for this device: timing ours alone", file=sys.stderr)
        return None
    keys, *conditioning = inputs
    num_steps = len(solver.timesteps)
    table = tabulate(RULES["cpgd"], num_steps, len(keys))
    coefficients = torch.from_numpy(table.steady + (table.w[:, :, None] * table.contrast).sum(axis=1)).to(on)
    shape = (size, size, network.config.in_channels)
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)
    # The library annotates `from_config` as if it returned a tuple.
    scheduler: Any = DDIMScheduler.from_config(family.scheduler_config)
    unet = functools.cache(lambda: torch_unet(network).to(on))
    predict = functools.cache(lambda: torch.compile(unet()) if compiled else unet())

    def tensor(array):
        return torch.tensor(np.asarray(array)).to(on, unet().dtype)

    @torch.inference_mode()
    def run():
        prompts = {name: jax.tree.map(tensor, part) for name, part in zip(("text", "empty"), conditioning, strict=True)}
        latents = torch.tensor(np.asarray(noise)).to(on).permute(0, 3, 1, 2).contiguous()
        scheduler.set_timesteps(num_steps)
        for i, timestep in enumerate(scheduler.timesteps):
            noise_pred, active = 0, None
            for r, (module, prompt) in enumerate(table.rows):
                if module != active:
                    switch_adapter(unet(), module)
                    active = module
                states, added = prompts[prompt]["encoder_hidden_states"], dict(prompts[prompt])
                del added["encoder_hidden_states"]
                predicted = predict()(
                    latents.to(unet().dtype), timestep, states, added_cond_kwargs=added or None
                ).sample
                noise_pred = noise_pred + coefficients[i, r, :, None, None, None] * predicted.float()
            latents = scheduler.step(noise_pred, timestep, latents).prev_sample
        return latents.permute(0, 2, 3, 1).cpu().numpy()

    return run


def torch_unet(network: Network) -> Any:
    """diffusers' UNet with the weights and adapters of ours, in the dtype that ours computes in."""
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from peft import LoraConfig

    base, lora = split_lora(network.params)
    with torch.device("meta"):  # its own random weights would take ten seconds
        unet: Any = UNet2DConditionModel.from_config(network.config.to_dict())
    unet.to_empty(device="cpu")
    stored, matrices = to_stored(base), flatten_dict(lora)
    for name, parameter in unet.named_parameters():
        parameter.data.copy_(torch.tensor(np.float32(stored[name])))
    rank = next(leaf.shape[1] for path, leaf in matrices.items() if path[-1] == "lora_b")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are the point
        for module in MODULES:
            unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(DEFAULT_TARGETS)), module)
    parameters = dict(unet.named_parameters())
    for (*path, leaf), bank in matrices.items():
        for module, matrix in zip(MODULES, np.asarray(bank), strict=True):
            name = ".".join(map(str, (*path, {"lora_a": "lora_A", "lora_b": "lora_B"}[leaf], module, "weight")))
            parameters[name].data.copy_(torch.tensor(np.float32(matrix.T)))
    dtype = jax.tree.leaves(base)[0].dtype.name
    return unet.to(getattr(torch, dtype)).eval()


def switch_adapter(unet, module: str) -> None:
    """Makes diffusers' UNet the base network or one of the modules."""
    if module == BASE:
        unet.disable_adapters()
    else:
        unet.enable_adapters()
        unet.set_adapter(module)
