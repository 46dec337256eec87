"""Times what training waits for: `python -m train.bench data|step|compile [--json FILE]`.

`data`: how many pairs a second come from a prepared set into batches on the device, and where the time goes; how fast
JPEGs are decoded and resized, beside torch's DataLoader; and whether memory stays flat over a million pairs. `step`:
one step of Diffusion-DPO with random weights, beside the same step in torch and the step that trains a positive and a
negative module at once. `compile`: from the start of Python to that step, with an empty compilation cache and with a
filled one.
"""

import sys

from flax_pref.config import run_main
from sample.bench.common import run_bench
from train.bench.compile import Compile, bench_compile
from train.bench.data import Data, bench_data
from train.bench.step import Step, bench_step

BENCHES = {Data: bench_data, Step: bench_step, Compile: bench_compile}


def main(arguments: list[str]) -> None:
    """Runs one bench and prints its figures."""
    run_bench(BENCHES, arguments)


if __name__ == "__main__":
    sys.exit(run_main(main))
