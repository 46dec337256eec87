"""Trains the demo's base model: `python -m train.base configs/demo/base.py`; the same as `flax-pref base`."""

import sys

from flax_pref.cli.base import main
from flax_pref.config import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
