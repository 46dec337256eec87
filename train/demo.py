"""The whole path on the demo world: `python -m train.demo configs/demo/demo.py`; the same as `flax-pref demo`."""

import sys

from flax_pref.cli.demo import main
from flax_pref.config import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
