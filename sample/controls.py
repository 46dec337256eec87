"""Draws controls of the base model, scores them with the methods, and writes the report that compares all.

    python -m sample.controls runs/base runs/cpgd --prompts test.tsv --validation others.txt --rewards pickscore

The same as `flax-pref controls`. The base model at a guidance scale tuned on other prompts, with as many more steps as
the most expensive method spends more predictions, and the best of several images by a reward: all paired with the
methods, with what each costs. Run again with the same flags after a kill, it resumes.
"""

import sys

from flax_pref.cli.controls import main
from flax_pref.config import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
