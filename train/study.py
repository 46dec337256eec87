"""When does contrastive guidance pay: `python -m train.study configs/demo/study.py`; the same as `flax-pref study`."""

import sys

from flax_pref.cli.study import main
from flax_pref.config import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
