"""Encodes a preference set for training, once: `python -m train.encode configs/demo/encode.py`.

The same as `flax-pref encode`.
"""

import sys

from flax_pref.cli.encode import main
from flax_pref.config import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
