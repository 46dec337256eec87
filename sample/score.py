"""Scores finished folders of images, or the pairs of prepared sets, with rewards.

    python -m sample.score runs/base runs/cpgd --rewards pickscore hpsv2.1=HPS_v2.1_compressed.pt --features clip
    python -m sample.score my/images --prompts prompts.tsv --rewards aesthetic=head.pth imagereward
    python -m sample.score runs/pick_a_pic_sd15 --rewards pickscore hpsv2.1 imagereward
    python -m sample.score runs/base --benchmarks geneval=results.jsonl

The same as `flax-pref score`. A folder is one of `sample.images`, or any with images: with their prompts in a file
(--prompts), in a .txt or .json of the same name beside each, or in the images: see `evaluation.runs.open_run`.

Writes `scores.parquet` beside the images: a row per image with a column for each reward and benchmark, to which later
calls add.
After a kill, the same command resumes. A prepared set of `train.encode` gets `scores/NAME.parquet` for each reward,
with both images of each pair: see `evaluation.pair_scoring`.
"""

import sys

from flax_pref.cli.score import main
from flax_pref.config import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
