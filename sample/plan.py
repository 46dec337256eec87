"""Plans sampling for a TPU slice that is not there.

    python -m sample.plan --model demo --rule cpgd --w 4 --steps 25 --topology v5e:2x2

The same as `flax-pref plan-sample`. Takes the flags of sample.images that have a meaning without images, except for
modules: `--weights` says what those of the rule are. docs/planning.md explains the figures.
"""

from flax_pref.cli.command import leave
from flax_pref.cli.plan_sample import main
from flax_pref.config import run_main

if __name__ == "__main__":
    leave(run_main(main))
