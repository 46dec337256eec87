"""Times what users wait for: `python -m sample.bench unet --json unet.json` or `python -m sample.bench load`.

`unet`: one forward pass of the UNet with random weights, and beside it that of diffusers in torch, in turns, where
diffusers is installed. `load`: time and peak host memory of loading a checkpoint of full size with random weights.
"""

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.checkpoints.weights import Network, abstract_network, load_network, save_network
from flax_pref.config import parse_flags, run_main
from flax_pref.models.attention import Kernel
from flax_pref.models.presets import FAMILIES, Family
from flax_pref.models.unet import set_attention


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Measures the loading of a checkpoint."""

    family: Literal["sd15", "sdxl"] = "sdxl"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    part: Literal["unet", "pipeline"] = "unet"
    folder: Path | None = None
    """A checkpoint in the layout of diffusers; None: a UNet with random weights in one float32 file, made for the
    occasion in a temporary folder (needs 11 GB of disk and of memory for SDXL's)."""
    json: Path | None = None
    """File for the figures."""


def main(arguments: list[str]) -> None:
    """Runs one bench and prints its figures."""
    bench = parse_flags(arguments, tyro.extras.subcommand_type_from_defaults({"unet": Unet(), "load": Load()}))
    figures = bench_unet(bench) if isinstance(bench, Unet) else bench_load(bench)
    print(json.dumps(figures, indent=2))
    if bench.json is not None:
        bench.json.parent.mkdir(parents=True, exist_ok=True)
        bench.json.write_text(json.dumps(figures, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# One forward pass


def bench_unet(bench: Unet) -> dict:
    """Seconds per forward pass, ours and theirs."""
    family = FAMILIES[bench.family]
    size = (bench.size or family.resolution) // 8
    network = random_network("unet", family.unet, bench.dtype)
    unet = nnx.merge(network.graphdef, network.params)
    set_attention(unet, bench.attention)
    graphdef, state = nnx.split(unet)
    params = nnx.to_pure_dict(state)
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
        candidates = {"seconds": lambda compiled=compiled, inputs=inputs: compiled(params, inputs).block_until_ready()}
        if reference is not None:
            candidates["torch_seconds"] = lambda inputs=inputs: reference(inputs)
        medians = time_in_turns(candidates, bench.rounds)
        row |= {name: round(seconds, 4) for name, seconds in medians.items()}
        if reference is not None:
            row["ratio_to_torch"] = round(medians["seconds"] / medians["torch_seconds"], 3)
        figures["batches"].append(row)
    return figures


def time_in_turns(candidates: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each; one untimed call first. In turns, so that a busy machine slows all alike."""
    for call in candidates.values():
        call()
    seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def random_network(kind: str, config, dtype="float32") -> Network:
    """A network with random weights of the size that keeps activations bounded, in the given dtype."""
    network = abstract_network(kind, config, jnp.dtype(dtype))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        values = rng.standard_normal(shape, dtype=np.float32)
        scale = 0.02 if name == "embedding" else np.prod(shape[:-1]) ** -0.5 if name == "kernel" else 0.1
        values *= np.float32(scale)
        if name == "scale":
            values += 1
        return jnp.asarray(values, leaf.dtype)

    return network._replace(params=jax.tree_util.tree_map_with_path(draw, network.params))


def random_inputs(family: Family, batch_size: int, size: int) -> dict[str, np.ndarray]:
    """Arguments of a UNet; `size` in latent pixels."""
    rng = np.random.default_rng(1)
    shapes = {
        "latents": (size, size, family.unet.in_channels),
        "encoder_hidden_states": (77, family.unet.cross_attention_dim),
    }
    if family.unet.addition_embed_type == "text_time":
        shapes["text_embeds"] = (family.text_encoders[-1].projection_dim,)
    inputs = {name: rng.standard_normal((batch_size, *shape), dtype=np.float32) for name, shape in shapes.items()}
    inputs["timesteps"] = np.linspace(981, 21, batch_size).astype(np.int32)
    if "text_embeds" in inputs:
        inputs["time_ids"] = np.tile(np.float32([8 * size, 8 * size, 0, 0, 8 * size, 8 * size]), (batch_size, 1))
    return inputs


def torch_unet(family: Family, dtype: str) -> Callable | None:
    """diffusers' UNet in eager mode as a function of our inputs; None where it is not installed."""
    try:
        import torch
        from diffusers import UNet2DConditionModel
    except ImportError:
        print("diffusers or torch is not installed: timing ours alone", file=sys.stderr)
        return None
    kind = getattr(torch, dtype)
    unet = UNet2DConditionModel.from_config(family.unet.to_dict()).to(kind).eval()

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


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def bench_load(bench: Load) -> dict:
    """Seconds and peak host memory of a process that loads a checkpoint and does nothing else."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = bench.folder
        if folder is None:
            if bench.part == "pipeline":
                raise ValueError("bench: --part pipeline needs --folder, a checkpoint in the layout of diffusers")
            folder = Path(temporary)
            _child("write", folder / "unet", bench.family)
        measured = json.loads(_child("load", folder, bench.part, bench.dtype))
        files = [file.stat().st_size for file in folder.rglob("*.safetensors")]
    figures = {
        **{"part": bench.part, "dtype": bench.dtype, "device": jax.devices()[0].device_kind},
        "largest_file_gb": round(max(files) / 1e9, 2),
        **measured,
    }
    figures["peak_over_largest_file"] = round(figures["peak_gb"] / (max(files) / 1e9), 3)
    return figures


def _child(*arguments) -> str:
    """Runs this file in a process of its own, for a process remembers its peak."""
    command = [sys.executable, "-m", "sample.bench", "--in-child", *map(str, arguments)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        raise ValueError(f"bench: {' '.join(command)} failed, see above")
    return child.stdout


def _in_child(job: str, folder: str, *arguments: str) -> None:
    if job == "write":
        unet = random_network("unet", FAMILIES[arguments[0]].unet)
        save_network(unet, folder, shard_bytes=2**62)
        return
    part, dtype = arguments
    before = peak_gb()
    started = time.perf_counter()
    kind = jnp.dtype(dtype)
    loaded = load_network("unet", Path(folder) / "unet", kind).params if part == "unet" else load_pipeline(folder, kind)
    networks = [loaded] if part == "unet" else [p.params for p in (loaded.unet, loaded.vae, *loaded.text_encoders)]
    leaves = jax.block_until_ready(jax.tree.leaves(networks))
    seconds = time.perf_counter() - started
    figures = {
        "seconds": round(seconds, 1),
        "parameters_gb": round(sum(leaf.nbytes for leaf in leaves) / 1e9, 2),
        "start_gb": round(before, 2),
        "peak_gb": round(peak_gb(), 2),
    }
    print(json.dumps(figures))


def peak_gb() -> float:
    """Largest resident memory of this process so far; Linux counts in kB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-child"]:
        _in_child(*sys.argv[2:])
    else:
        sys.exit(run_main(main))
