"""Flags of `flax-pref verify`; quick to import, for --help needs them."""

import dataclasses
from pathlib import Path

from flax_pref.models.choices import Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyFlags:
    """Checks that this machine computes what it should, in about five minutes, and prints a verdict for each check."""

    only: tuple[str, ...] = ()
    """Checks to run: devices, attention, convolutions, norms, quantization, collectives, noise, drawing, training,
    rewards, model, compilation, speed (default: all)."""
    model: str | None = None
    """Checkpoint whose networks are compared with diffusers, if torch is installed: a folder, a single file or a Hub id
    (default: none)."""
    rewards: tuple[str, ...] = ()
    """Rewards as NAME or NAME=PATH whose scores of four pictures are told."""
    recorded: Path | None = None
    """verify.json of a machine that is trusted, whose scores of rewards these are compared with (default: none)."""
    dtype: Dtype = "auto"
    """Compute precision of the kernels that are checked: auto, float32, bfloat16 or float16 (default: bfloat16 on TPUs
    and GPUs, float32 on CPUs)."""
    out: Path = Path("runs/verify")
    """Folder for verify.json and for verify.md, a block to paste into an issue."""
    hosts: str | None = None
    """Other processes of this run: auto, none, or ADDRESS:PORT,PROCESSES,NUMBER (default: those of a TPU pod, Slurm or
    Open MPI, if any)."""
