"""Trains preference modules: `python -m train.modules configs/demo/dpo.py`; the same as `flax-pref train`."""

import sys

from flax_pref.cli.train import main
from flax_pref.config import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
