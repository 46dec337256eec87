"""Time and peak host memory of loading a checkpoint of full size with random weights."""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from bench.common import peak_gb, random_network
from flax_pref.checkpoints.checkpoint import Pipeline
from flax_pref.checkpoints.diffusers import load_pipeline, save_pipeline
from flax_pref.checkpoints.single_file import save_single_file
from flax_pref.checkpoints.tokenizer import clip_tokenizer
from flax_pref.checkpoints.weights import load_network, save_network
from flax_pref.models.presets import FAMILIES

FOLDER, FILE = "checkpoint", "checkpoint.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Measures the loading of a checkpoint."""

    family: Literal["sd15", "sdxl"] = "sdxl"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    part: Literal["unet", "pipeline"] = "unet"
    folder: Path | None = None
    """A checkpoint in the layout of diffusers; None: one with random weights, made for the occasion in a temporary
    folder. unet: in one float32 file (needs 11 GB of disk and of memory for SDXL's); pipeline: in the dtype, as a
    folder and as a single file, which are both loaded."""
    json: Path | None = None
    """File for the figures."""


def bench_load(bench: Load) -> dict:
    """Seconds and peak host memory of a process that loads a checkpoint and does nothing else."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = bench.folder
        if folder is None:
            folder = Path(temporary)
            _child(f"write_{bench.part}", folder, bench.family, bench.dtype)
            if bench.part == "pipeline":
                return _both(folder, bench.dtype)
        measured = json.loads(_child("load", folder, bench.part, bench.dtype))
        files = [file.stat().st_size for file in folder.rglob("*.safetensors")]
    figures = {
        **{"part": bench.part, "dtype": bench.dtype, "device": jax.devices()[0].device_kind},
        "largest_file_gb": round(max(files) / 1e9, 2),
        **measured,
    }
    figures["peak_over_largest_file"] = round(figures["peak_gb"] / (max(files) / 1e9), 3)
    return figures


def _both(folder: Path, dtype: str) -> dict:
    """Loads the same checkpoint as a folder and as a single file, in turns; keeps the fastest of three runs of each."""
    figures: dict = {"part": "pipeline", "dtype": dtype, "device": jax.devices()[0].device_kind}
    layouts = {"folder": folder / FOLDER, "single_file": folder / FILE}
    runs = [
        (name, json.loads(_child("load", path, "pipeline", dtype))) for _ in range(3) for name, path in layouts.items()
    ]
    size = layouts["single_file"].stat().st_size / 1e9
    for name in layouts:
        fastest = min((run for layout, run in runs if layout == name), key=lambda run: run["seconds"])
        figures[name] = {**fastest, "peak_over_file": round(fastest["peak_gb"] / size, 3)}
    return figures | {"file_gb": round(size, 2)}


def _child(*arguments) -> str:
    """Runs this file in a process of its own, for a process remembers its peak."""
    command = [sys.executable, "-m", "bench.load", *map(str, arguments)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        raise ValueError(f"bench: {' '.join(command)} failed, see above")
    return child.stdout


def _in_child(job: str, folder: str, *arguments: str) -> None:
    if job == "write_unet":
        unet = random_network("unet", FAMILIES[arguments[0]].unet)
        save_network(unet, Path(folder) / "unet", shard_bytes=2**62)
        return
    if job == "write_pipeline":
        family, dtype = arguments
        pipeline = _random_pipeline(family, dtype)
        save_pipeline(pipeline, Path(folder) / FOLDER, dtype=jnp.dtype(dtype))
        save_single_file(pipeline, Path(folder) / FILE, dtype=jnp.dtype(dtype))
        return
    part, dtype = arguments
    before = peak_gb()
    started = time.perf_counter()
    kind = jnp.dtype(dtype)
    if part == "unet":
        networks = [load_network("unet", Path(folder) / "unet", kind)]
    else:
        loaded = load_pipeline(folder, kind)
        networks = [loaded.unet, loaded.vae, *loaded.text_encoders]
        del loaded
    leaves = jax.block_until_ready(jax.tree.leaves([network.params for network in networks]))
    seconds = time.perf_counter() - started
    figures = {
        "seconds": round(seconds, 1),
        "parameters_gb": round(sum(leaf.nbytes for leaf in leaves) / 1e9, 2),
        "start_gb": round(before, 2),
        "peak_gb": round(peak_gb(), 2),
    }
    print(json.dumps(figures))


def _random_pipeline(name: str, dtype: str) -> Pipeline:
    family = FAMILIES[name]
    return Pipeline(
        unet=random_network("unet", family.unet, dtype),
        vae=random_network("vae", family.vae, dtype),
        text_encoders=tuple(random_network("text_encoder", config, dtype) for config in family.text_encoders),
        tokenizers=(clip_tokenizer(), clip_tokenizer(pad_token="!"))[: len(family.text_encoders)],
        scheduler_config=family.scheduler_config,
        force_zeros_for_empty_prompt=len(family.text_encoders) == 2,
    )


if __name__ == "__main__":
    _in_child(*sys.argv[1:])
