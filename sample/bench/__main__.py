"""Times what users wait for: `python -m sample.bench unet` or another of these, [--json FILE].

`unet`: one forward pass of the UNet with random weights, and beside it that of diffusers in torch, in turns, where
diffusers is installed. `forward`: the same pass as the compiler of TPUs makes it, which runs on any machine. `load`:
time and peak host memory of loading a checkpoint of full size with random weights. `guidance`: one sampling step under
each guidance rule, beside the same step in torch. `writing`: how much of the time goes to sampling while images are
encoded and written. `tradeoff`: what cheaper guidance keeps of the gain in the demo world. `rewards`: PickScore beside
transformers in torch, and the memory of its gradient.
"""

import sys

from flax_pref.config import run_main
from sample.bench.common import run_bench
from sample.bench.forward import Forward, bench_forward
from sample.bench.guidance import Guidance, bench_guidance
from sample.bench.load import Load, bench_load
from sample.bench.rewards import Rewards, bench_rewards
from sample.bench.tradeoff import Tradeoff, bench_tradeoff
from sample.bench.unet import Unet, bench_unet
from sample.bench.writing import Writing, bench_writing

BENCHES = {
    Unet: bench_unet,
    Forward: bench_forward,
    Load: bench_load,
    Guidance: bench_guidance,
    Writing: bench_writing,
    Tradeoff: bench_tradeoff,
    Rewards: bench_rewards,
}


def main(arguments: list[str]) -> None:
    """Runs one bench and prints its figures."""
    run_bench(BENCHES, arguments)


if __name__ == "__main__":
    sys.exit(run_main(main))
