"""One training step with random weights: Diffusion-DPO, the same step in torch, and both modules of cPGD at once.

Each candidate is a process of its own, so that its peak of memory is its own. On CPUs two at a time make steps in
turns, so that a busy machine slows both alike; an accelerator belongs to one after the other.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict

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
from bench.guidance import MODULES, switch_adapter, torch_unet, with_adapters
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.methods import DiffusionDPO, PositiveNegative
from flax_pref.methods.errors import draw_noise
from flax_pref.models.attention import Kernel
from flax_pref.models.lora import BASE, select_lora, split_lora
from flax_pref.models.network import with_attention, with_remat
from flax_pref.models.platform import default_dtype
from flax_pref.models.presets import Family
from flax_pref.models.remat import Remat
from flax_pref.parallel.peak import peak_of, step_flops
from flax_pref.training.networks import LoRA, trained_networks
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.step import make_step, new_state

# Of DPO: at the paper's 5000 the rounding of two errors would come back 2500 times as large in loss and gradient.
BETA = 1.0
METHODS = {"dpo": DiffusionDPO(beta=BETA), "positive_negative": PositiveNegative()}
OPTIMIZER = OptimizerConfig(learning_rate=1e-5, clip_norm=None)
# What the candidates of ours have in common.
SHARED = ("device", "dtype", "peak_tflops", "peak_is", "measured_peak_tflops", "copy_gb_per_second")
POLICY = MODULES[0]  # of the two modules of `with_adapters`, the one that DPO trains


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Times one training step: loss, gradient and update."""

    family: Literal["sd15", "sdxl"] = "sd15"
    unet: Path | None = None
    """config.json of another UNet that takes the place of the family's."""
    objective: Literal["dpo", "positive_negative"] = "dpo"
    """Whose step is timed, beside its rivals."""
    adapters: Literal["lora", "full"] = "lora"
    """Train adapters, or all weights."""
    rank: int = 16
    """Of the adapters."""
    batch_size: int = 1
    """Pairs."""
    size: int | None = None
    """Side of the images in pixels; None: the family's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the network computes in; auto: bfloat16 on TPUs and GPUs, float32 on CPUs."""
    attention: Kernel = "auto"
    remat: Remat = "none"
    """What is computed again in the backward pass instead of kept; see `models.remat.set_remat`."""
    rounds: int = 3
    """Timed steps of each; the median counts."""
    reference: bool = True
    """Also time the step of DPO with adapters in torch, with diffusers and peft where they are installed (on CPUs and
    CUDA GPUs)."""
    torch_compile: bool | None = None
    """Through torch.compile; None: on GPUs."""
    both: bool = True
    """Also time the step that trains a positive and a negative module in one batched pass, beside that of dpo."""
    json: Path | None = None
    """File for the figures."""


def bench_step(bench: Step) -> dict:
    """Seconds, work and memory of a step, and those of its rivals."""
    if bench.batch_size < 1:
        raise ValueError(f"bench: --batch-size {bench.batch_size}; expected at least one pair")
    if bench.rounds < 1:
        raise ValueError(f"bench: --rounds {bench.rounds}; expected at least one timed step")
    rivals = []
    if bench.objective == "dpo":
        if bench.both:
            rivals.append("positive_negative")
        if bench.reference and bench.adapters == "lora" and torch_is_there():
            rivals.insert(0, "torch")
    with tempfile.TemporaryDirectory() as folder:
        rows, ratios, times = measure(bench, rivals, Path(folder))
        differences = {"torch": differences_of_moments(Path(folder))} if "torch" in rows else {}
    first = rows[bench.objective]
    shared = {name: first.pop(name) for name in (*SHARED, "parameter_bytes")}
    reached = Reached(1e12 * shared["measured_peak_tflops"], 1e9 * shared["copy_gb_per_second"])
    for name, row in rows.items():
        row["pairs_per_second"] = round(bench.batch_size / row["step_seconds"], 5)
        if name in ratios:
            row["ratio_to_" + bench.objective] = round(ratios[name], 3)
        if "gflop_per_step" in row:
            flops, seconds = 1e9 * row["gflop_per_step"], row["step_seconds"]
            peak = shared["peak_tflops"]
            row["share_of_peak"] = peak and round(flops / seconds / 1e12 / peak, 3)
            row |= reached.shares(flops, row.pop("bytes_accessed"), seconds)
        for repeated in shared.keys() & row.keys():
            del row[repeated]
    figures = {
        **{
            "family": bench.family,
            "size": family_of(bench.family, bench.unet, bench.size)[1] * 8,
            "batch_size": bench.batch_size,
        },
        **{"adapters": bench.adapters, "rank": bench.rank, "attention": bench.attention, "remat": bench.remat},
        **{"jax": jax.__version__, "rounds": bench.rounds, **shared, "steps": rows, "each_round": times},
    }
    if "torch" in rows:
        figures["torch"] = {
            "ratio_to_torch": round(1 / ratios["torch"], 3),
            "memory_ratio_to_torch": round(first["peak_memory_gb"] / rows["torch"]["peak_memory_gb"], 3),
            "loss_difference": float(f"{abs(first['loss'] - rows['torch']['loss']):.1e}"),
            "largest_relative_gradient_difference": float(f"{differences['torch']:.1e}"),
        }
    return figures


def torch_is_there() -> bool:
    """Whether torch, diffusers and peft are installed."""
    found = all(importlib.util.find_spec(name) for name in ("torch", "diffusers", "peft"))
    if not found:
        print("no torch with diffusers and peft: timing ours alone", file=sys.stderr)
    return found


def measure(
    bench: Step, rivals: list[str], folder: Path
) -> tuple[dict[str, dict], dict[str, float], dict[str, list[float]]]:
    """Times the step of each candidate.

    Returns:
        figures of each candidate with its `step_seconds`, the ratios of the rivals to the first, and the seconds of
        each round, of the first candidate those beside the first rival.
    """
    rows, ratios, times = {}, {}, {}
    with candidate(bench.objective, bench, folder) as ours:
        in_turns = ours.told["platform"] == "cpu"
        for rival in rivals if in_turns else ():
            with candidate(rival, bench, folder) as theirs:
                pair = time_in_turns({bench.objective: ours.step, rival: theirs.step}, bench.rounds)
                middle = medians(pair)
                rows[rival], ratios[rival] = theirs.told, middle[rival] / middle[bench.objective]
                times = pair | times
        if not times:
            times = time_in_turns({bench.objective: ours.step}, bench.rounds)
        rows = {bench.objective: ours.told, **rows}
    for rival in () if in_turns else rivals:
        with candidate(rival, bench, folder) as theirs:
            times |= time_in_turns({rival: theirs.step}, bench.rounds)
            rows[rival] = theirs.told
    seconds = medians(times)
    ratios = {rival: seconds[rival] / seconds[bench.objective] for rival in rivals} | ratios
    for name, row in rows.items():
        row["step_seconds"] = round(seconds[name], 5)
        del row["platform"]
    return rows, ratios, each_round(times)


class Candidate:
    """A process that makes a step whenever it is asked to."""

    def __init__(self, process: subprocess.Popen[str], name: str):
        assert process.stdin is not None and process.stdout is not None
        self.asks, self.answers, self.name = process.stdin, process.stdout, name
        self.told = self._hear()

    def step(self) -> None:
        """Asks for a step and waits for it."""
        self.asks.write("step\n")
        self.asks.flush()
        self.told |= self._hear()

    def _hear(self) -> dict:
        line = self.answers.readline()
        if not line:
            raise ValueError(f"bench: {self.name} ended early, see above")
        return json.loads(line)


@contextlib.contextmanager
def candidate(name: str, bench: Step, folder: Path) -> Iterator[Candidate]:
    """A process that makes the steps of `name`, and leaves first moments of its optimizer in the folder."""
    fields = json.dumps({**dataclasses.asdict(bench), "json": None}, default=str)
    command = [sys.executable, "-m", "bench.step", name, fields, str(folder)]
    # What torch's process needs of JAX are weights and noise.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"} if name == "torch" else None
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        started = Candidate(process, " ".join(command))
        try:
            yield started
        finally:
            started.asks.close()
            process.wait()


def differences_of_moments(folder: Path) -> float:
    """The largest difference of gradients, layer by layer, relative to the largest number of the layer's.

    After one step of AdamW its first moments are a tenth of the gradient.
    """
    ours, theirs = (np.load(folder / f"{name}.npz") for name in ("dpo", "torch"))
    if set(ours) != set(theirs):
        raise ValueError("bench: torch trains other matrices than the adapters of ours")
    return max(float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in theirs)


# ----------------------------------------------------------------------------------------------------------------------
# In the process of a candidate


class Prepared(NamedTuple):
    """What a candidate times.

    Attributes:
        told: figures that it knows before any step.
        step: makes a step, waits for it and returns the loss.
        moments: the first moments of the optimizer by name, in the axes of ours.
        peak_gb: largest memory in use so far.
    """

    told: dict[str, Any]
    step: Callable[[], float]
    moments: Callable[[], dict[str, np.ndarray]]
    peak_gb: Callable[[], float]


def _child(name: str, fields: str, folder: str) -> None:
    values = json.loads(fields)
    values["unet"] = values["unet"] and Path(values["unet"])
    bench = Step(**values)
    prepared = prepare_torch(bench) if name == "torch" else prepare(bench, name)
    told = {**prepared.told, "memory_before_gb": round(prepared.peak_gb(), 3)}
    print(json.dumps(told), flush=True)
    for count, _ in enumerate(sys.stdin):
        loss = prepared.step()
        if count == 0:
            told["loss"] = loss
            if bench.adapters == "lora" and name in ("dpo", "torch"):
                np.savez(Path(folder) / f"{name}.npz", allow_pickle=True, **prepared.moments())
        print(json.dumps({**told, "peak_memory_gb": round(prepared.peak_gb(), 3)}), flush=True)


def pairs(family: Family, batch_size: int, size: int) -> dict[str, Any]:
    """A batch of objectives: `winner` and `loser [B, H, W, C]`, `text [B, ...]` and the sizes of images `[B, 2, 6]`."""
    inputs = random_inputs(family, 2 * batch_size, size)
    latents, time_ids = inputs.pop("latents"), inputs.pop("time_ids", None)
    del inputs["timesteps"]
    batch: dict[str, Any] = {"winner": latents[::2], "loser": latents[1::2]}
    batch["text"] = {name: array[:batch_size] for name, array in inputs.items()}
    if time_ids is not None:
        batch["time_ids"] = time_ids.reshape(batch_size, 2, -1)
    return batch


def prepare(bench: Step, name: str) -> Prepared:
    """The step of an objective, compiled."""
    (family, size), dtype, device = (
        family_of(bench.family, bench.unet, bench.size),
        default_dtype(bench.dtype),
        jax.devices()[0],
    )
    method, key = METHODS[name], jax.random.key(0)
    base = with_attention(random_network("unet", family.unet, dtype), bench.attention)
    schedule, batch = NoiseSchedule.from_dict(family.scheduler_config), pairs(family, bench.batch_size, size)

    def program(remat: Remat):
        network = with_remat(base, remat)
        trained, begin = trained_networks(network, method.modules, bench.adapters, LoRA(rank=bench.rank))

        def loss(params, frozen, batch, key):
            return method.loss(trained.predict(params, frozen), batch, key, schedule=schedule)

        independent = trained.independent if len(method.modules) > 1 else None
        kinds = {"independent": independent, "modules": method.modules}
        step = make_step(loss, OPTIMIZER.build(1), OPTIMIZER.rate(1), **kinds)

        def first(params):
            return new_state(params, OPTIMIZER.build(1), jax.random.key(0), averaged=False, independent=independent)

        return jax.jit(step, donate_argnums=0), begin, first

    step, begin, first = program(bench.remat)
    if bench.adapters == "lora":
        lora = split_lora(with_adapters(base, bench.rank).params)[1]
        params = select_lora(lora, 0) if len(method.modules) == 1 else lora
    else:
        params = jax.jit(begin)(base.params, key)
    frozen = base.params if bench.adapters == "lora" or method.reference else {}
    state = [jax.jit(first)(params)]
    del params
    peak, peak_is = peak_of(device, dtype)
    reached = Reached.measured(dtype)
    started = time.perf_counter()
    compiled = step.lower(state[0], frozen, batch).compile()
    memory = compiled.memory_analysis()
    assert memory is not None  # CPUs and accelerators tell it
    told = {
        **{"platform": device.platform, "device": device.device_kind, "dtype": dtype},
        **{"peak_tflops": peak and round(peak / 1e12, 3), "peak_is": peak_is, **reached.figures()},
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(base.params)),
        "compile_seconds": round(time.perf_counter() - started, 2),
        # The work of the step, not that of computing it twice.
        "gflop_per_step": round(step_flops(program("none")[0], state[0], frozen, batch) / 1e9, 3),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "bytes_accessed": bytes_accessed(compiled),
    }

    def run() -> float:
        state[0], metrics = compiled(state[0], frozen, batch)
        return float(jax.block_until_ready((state[0], metrics))[1]["loss"])

    def moments() -> dict[str, np.ndarray]:
        flat = flatten_dict(optax.tree_utils.tree_get(state[0].optimizer, "mu"))
        return {".".join(map(str, path)): np.asarray(leaf)[0] for path, leaf in flat.items()}

    return Prepared(told, run, moments, memory_peak_gb)


def prepare_torch(bench: Step) -> Prepared:
    """Diffusion-DPO as training scripts of diffusers make it: two rows for a pair, the reference without adapters."""
    import torch
    import torch.nn.functional as F

    (family, size), dtype = family_of(bench.family, bench.unet, bench.size), default_dtype(bench.dtype)
    on = "cuda" if torch.cuda.is_available() else "cpu"
    network = with_adapters(random_network("unet", family.unet, dtype), bench.rank)
    unet = torch_unet(network).to(on)
    del network
    batch = pairs(family, bench.batch_size, size)
    schedule = NoiseSchedule.from_dict(family.scheduler_config)
    # That of the first step of ours.
    timesteps, noise = draw_noise(schedule, batch["winner"], jax.random.fold_in(jax.random.key(0), 0))
    noisy = [schedule.add_noise(batch[image], noise, timesteps) for image in ("winner", "loser")]

    def tensor(*parts):  # all winners, then all losers
        return torch.cat([torch.tensor(np.asarray(part)) for part in parts]).to(on)

    latents, noise = (tensor(*images).permute(0, 3, 1, 2).contiguous() for images in (noisy, (noise, noise)))
    steps = tensor(timesteps, timesteps)
    text = {name: tensor(array, array).to(unet.dtype) for name, array in batch["text"].items()}
    states = text.pop("encoder_hidden_states")
    if "time_ids" in batch:
        text["time_ids"] = tensor(batch["time_ids"][:, 0], batch["time_ids"][:, 1])
    switch_adapter(unet, POLICY)
    trained = {}
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(f".{POLICY}." in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            trained[name] = parameter
    optimizer = torch.optim.AdamW(
        trained.values(), OPTIMIZER.learning_rate, betas=(OPTIMIZER.b1, OPTIMIZER.b2), weight_decay=0.0
    )
    compiled = bench.torch_compile if bench.torch_compile is not None else on == "cuda"
    predict = torch.compile(unet) if compiled else unet
    mixed = torch.autocast(on, getattr(torch, dtype), enabled=dtype != "float32")

    def errors():
        with mixed:
            noise_pred = predict(latents.to(unet.dtype), steps, states, added_cond_kwargs=text or None).sample
        return F.mse_loss(noise_pred.float(), noise, reduction="none").mean(dim=(1, 2, 3)).chunk(2)

    def run() -> float:
        winner, loser = errors()
        switch_adapter(unet, BASE)
        with torch.no_grad():
            reference_winner, reference_loser = errors()
        switch_adapter(unet, POLICY)
        logits = -BETA / 2 * ((winner - loser) - (reference_winner - reference_loser))
        loss = -F.logsigmoid(logits).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def moments() -> dict[str, np.ndarray]:
        ours = {f".lora_A.{POLICY}.weight": ".lora_a", f".lora_B.{POLICY}.weight": ".lora_b"}
        named = {}
        for name, parameter in trained.items():
            ending = next(filter(name.endswith, ours))
            matrix = optimizer.state[parameter]["exp_avg"].cpu().numpy().T
            named[name.removesuffix(ending) + ours[ending]] = matrix
        return named

    def peak_gb() -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if on == "cuda" else memory_peak_gb()

    return Prepared({"platform": on, "compiled": compiled}, run, moments, peak_gb)


if __name__ == "__main__":
    _child(*sys.argv[1:])
