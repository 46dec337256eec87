"""One forward pass of the UNet with random weights, and beside it that of diffusers in torch, in turns."""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from bench.common import each_round, medians, random_inputs, random_network, time_in_turns
from flax_pref.models.attention import Kernel
from flax_pref.models.network import with_attention
from flax_pref.models.presets import FAMILIES, Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unet:
    """Times one forward pass of the UNet."""

    family: Literal["sd15", "sdxl"] = "sd15"
    size: int | None = None
    """Side of the images in pixels; None: the family's own."""
    batch_sizes: tuple[int, ...] = (1, 2)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Kernel = "auto"
    rounds: int = 5
    """Timed passes of each, in turns; the median counts."""
    reference: bool = True
    """Also time diffusers' UNet in torch, eager, where it is installed (on the CPU)."""
    json: Path | None = None
    """File for the figures."""


def bench_unet(bench: Unet) -> dict:
    """Seconds per forward pass, ours and theirs."""
    family = FAMILIES[bench.family]
    size = (bench.size or family.resolution) // 8
    _, graphdef, params = with_attention(random_network("unet", family.unet, bench.dtype), bench.attention)
    forward = jax.jit(lambda params, inputs: nnx.merge(graphdef, params)(**inputs))
    reference = torch_unet(family, bench.dtype) if bench.reference else None

    figures = {
        **{"family": bench.family, "size": 8 * size, "dtype": bench.dtype, "device": jax.devices()[0].device_kind},
        **{"jax": jax.__version__, "attention": bench.attention, "batches": []},
    }
    for batch_size in bench.batch_sizes:
        inputs = random_inputs(family, batch_size, size)
        started = time.perf_counter()
        compiled = forward.lower(params, inputs).compile()
        row = {"batch_size": batch_size, "compile_seconds": round(time.perf_counter() - started, 2)}
        candidates: dict[str, Callable[[], Any]] = {
            "seconds": lambda compiled=compiled, inputs=inputs: compiled(params, inputs).block_until_ready()
        }
        if reference is not None:
            candidates["torch_seconds"] = lambda inputs=inputs: reference(inputs)
        times = time_in_turns(candidates, bench.rounds)
        row |= {name: round(seconds, 4) for name, seconds in medians(times).items()}
        if reference is not None:
            row["ratio_to_torch"] = round(row["seconds"] / row["torch_seconds"], 3)
        row["each_round"] = each_round(times)
        figures["batches"].append(row)
    return figures


def torch_unet(family: Family, dtype: str) -> Callable | None:
    """diffusers' UNet in eager mode as a function of our inputs; None where it is not installed."""
    try:
        import torch
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    except ImportError:
        print("diffusers or torch is not installed: timing ours alone", file=sys.stderr)
        return None
    kind = getattr(torch, dtype)
    unet: Any = UNet2DConditionModel.from_config(family.unet.to_dict())  # annotated as if it were a tuple
    unet = unet.to(kind).eval()

    def run(inputs):
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        tensors = {name: x.to(kind) if x.is_floating_point() else x for name, x in tensors.items()}
        added = {name: tensors.pop(name) for name in ("text_embeds", "time_ids") if name in tensors}
        with torch.inference_mode():
            return unet(
                tensors["latents"].permute(0, 3, 1, 2).contiguous(),
                tensors["timesteps"],
                tensors["encoder_hidden_states"],
                added_cond_kwargs=added or None,
            ).sample

    return run
