"""Times what training waits for: `python -m train.bench data [--json FILE]`.

`data`: how many pairs a second come from a prepared set into batches on the device, and where the time goes; how fast
JPEGs are decoded and resized, beside torch's DataLoader; and whether memory stays flat over a million pairs.
"""

import json
import sys

import tyro

from flax_pref.config import parse_flags, run_main
from train.bench.data import Data, bench_data

BENCHES = {Data: bench_data}


def main(arguments: list[str]) -> None:
    """Runs one bench and prints its figures."""
    kinds = {kind.__name__.lower(): kind() for kind in BENCHES}
    bench = parse_flags(arguments, tyro.extras.subcommand_type_from_defaults(kinds))
    figures = BENCHES[type(bench)](bench)
    print(json.dumps(figures, indent=2))
    if bench.json is not None:
        bench.json.parent.mkdir(parents=True, exist_ok=True)
        bench.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_main(main))
