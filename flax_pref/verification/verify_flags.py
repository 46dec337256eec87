"""Flags of `flax-pref verify`; quick to import, for --help needs them."""

import dataclasses
from pathlib import Path

from flax_pref.models.choices import Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyFlags:
    """Checks that this machine computes what it should, in about five minutes, and prints a verdict for each check."""

    only: tuple[str, ...] = ()
    """Checks to run: devices, attention, convolutions, norms, quantization, collectives, noise, drawing, training,
    compilation, speed (default: all)."""
    dtype: Dtype = "auto"
    """Compute precision of the kernels that are checked: auto, float32, bfloat16 or float16 (default: bfloat16 on TPUs
    and GPUs, float32 on CPUs)."""
    out: Path | None = None
    """Folder for verify.json and for verify.md, a block to paste into an issue (default: nothing is written)."""
    hosts: str | None = None
    """Other processes of this run: auto, none, or ADDRESS:PORT,PROCESSES,NUMBER (default: those of a TPU pod, Slurm or
    Open MPI, if any)."""
