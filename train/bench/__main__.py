"""Times what training waits for: `python -m train.bench data [--json FILE]`.

`data`: how many pairs a second come from a prepared set into batches on the device, and where the time goes; how fast
JPEGs are decoded and resized, beside torch's DataLoader; and whether memory stays flat over a million pairs.
"""

import sys

from flax_pref.config import run_main
from sample.bench.common import run_bench
from train.bench.data import Data, bench_data

BENCHES = {Data: bench_data}


def main(arguments: list[str]) -> None:
    """Runs one bench and prints its figures."""
    run_bench(BENCHES, arguments)


if __name__ == "__main__":
    sys.exit(run_main(main))
