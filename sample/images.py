"""Draws images from a Stable Diffusion checkpoint: of one prompt, or of evaluation sets of tens of thousands.

    python -m sample.images --model PATH_OR_ID --prompt "a lighthouse in a storm" --seed 0 --out runs/images
    python -m sample.images --model PATH_OR_ID --prompts prompts.tsv --seeds 0-3 --module pos=pos.safetensors \\
        --module neg=neg.safetensors --rule cpgd --w 4 --steps 25 --out runs/cpgd

The same as `flax-pref sample`. The checkpoint is a folder in the diffusers layout, or the Hub id of one: Stable
Diffusion 1.x, 2.x or XL; "demo" is the small one of this package. After a kill, the same command resumes.
"""

import sys

from flax_pref.cli.sample import main
from flax_pref.config import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
