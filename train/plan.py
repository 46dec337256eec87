"""Plans a run for a TPU slice that is not there: `python -m train.plan configs/sd15/dpo.py --topology v5e:16x16`.

The same as `flax-pref plan`. Takes the configs and the flags of train.modules and train.encode, compiles their programs
for the slice, and prints memory, work and time of every chip. docs/planning.md explains the figures.
"""

from flax_pref.cli.command import leave
from flax_pref.cli.plan import main
from flax_pref.config import run_main

if __name__ == "__main__":
    leave(run_main(main))
