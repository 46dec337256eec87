"""Exports a sampler: as a program that a serving process loads without tracing, or as a pipeline of diffusers.

    python -m sample.export --model PATH_OR_ID --steps 25 --batch-size 4 --out runs/exported
    python -m sample.export --model PATH_OR_ID --module pos=pos.safetensors --module neg=neg.safetensors --rule cpgd \\
        --w 4 --platforms tpu cuda --out runs/exported
    python -m sample.export --model PATH_OR_ID --module pos=pos.safetensors --module neg=neg.safetensors --rule cpgd \\
        --w 4 --format diffusers --out runs/pipeline

The same as `flax-pref export`. `flax_pref.serving.sampler.load_sampler` loads it; docs/serving.md lists what may differ
from call to call, docs/integrations.md what a pipeline of diffusers can do. Flags are those of `sample.images`.
"""

import sys

from flax_pref.cli.export import main
from flax_pref.config import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
