"""Checks what this machine computes, and how fast.

    python -m sample.verify

The same as `flax-pref verify`.
"""

import sys

from flax_pref.cli.verify import main
from flax_pref.config import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
