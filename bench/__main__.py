"""Times what users wait for: `python -m bench unet`, or another name of these, [--json FILE].

Sampling:
    unet       one forward pass of the UNet with random weights, in turns with that of diffusers in torch
    forward    the same pass as the compiler of TPUs makes it, which runs on any machine
    load       time and peak host memory of loading a checkpoint of full size with random weights
    guidance   one sampling step under each guidance rule, beside the same step in torch
    writing    the share of the time that goes to sampling while images are encoded and written
    tradeoff   what cheaper guidance keeps of the gain in the demo world
    rewards    PickScore beside transformers in torch, memory of its gradient, and how long devices wait for a service

Training:
    data       pairs per second from a prepared set into batches on the device, JPEG decoding beside torch's DataLoader,
               and memory over a million pairs
    step       one step of Diffusion-DPO with random weights, beside the same step in torch and the step that trains a
               positive and a negative module at once
    online     the loss of DiffusionNFT beside its parts: the new policy, and the old one with the reference
    compile    the time from the start of Python to that step, with an empty compilation cache and with a filled one

All of them:
    all        every bench at a small size: one table with ratios to torch and with the noise
    compare    what became slower from one such table to another: python -m bench compare before.json after.json
"""

from bench.all import All, Compare, bench_all, bench_compare
from bench.common import run_bench
from bench.compile import Compile, bench_compile
from bench.data import Data, bench_data
from bench.forward import Forward, bench_forward
from bench.guidance import Guidance, bench_guidance
from bench.load import Load, bench_load
from bench.online import Online, bench_online
from bench.rewards import Rewards, bench_rewards
from bench.step import Step, bench_step
from bench.tradeoff import Tradeoff, bench_tradeoff
from bench.unet import Unet, bench_unet
from bench.writing import Writing, bench_writing
from flax_pref.cli.command import leave
from flax_pref.config import run_main

BENCHES = {
    Unet: bench_unet,
    Forward: bench_forward,
    Load: bench_load,
    Guidance: bench_guidance,
    Writing: bench_writing,
    Tradeoff: bench_tradeoff,
    Rewards: bench_rewards,
    Data: bench_data,
    Step: bench_step,
    Online: bench_online,
    Compile: bench_compile,
    All: bench_all,
    Compare: bench_compare,
}


def main(arguments: list[str]) -> None:
    """Runs one bench and prints its figures."""
    run_bench(BENCHES, arguments)


if __name__ == "__main__":
    leave(run_main(main))  # `bench forward` leaves a compiler that is still busy
