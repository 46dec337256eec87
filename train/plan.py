"""Plans a run for a TPU slice that is not there: `python -m train.plan configs/sd15/dpo.py --topology v5e:16x16`.

Takes the configs and the flags of train.modules and train.encode, compiles their programs for the slice, and prints
memory, work and time of every chip. docs/planning.md says what these figures are, and what they are not.
"""

import os
import sys

from flax_pref.config import load_config, run_main
from flax_pref.data.preparation import EncodeConfig
from flax_pref.planning.command import PlanFlags, compare, own_flags, show
from flax_pref.planning.training import candidates, jobs
from flax_pref.training.trainer import TrainConfig


def main(arguments: list[str]) -> None:
    """Prints the plan, or a table of several."""
    flags, others = own_flags(arguments, PlanFlags)
    config = load_config(others, TrainConfig | EncodeConfig)
    if flags.compare:
        print(compare("train.plan", arguments, candidates(config, flags.topology)))
    else:
        show(flags, "train.plan", arguments, lambda slice: jobs(config, slice))


if __name__ == "__main__":
    status = run_main(main)
    sys.stdout.flush()
    os._exit(status)  # the compiler may still be busy, see `planning.plan.laid_out`
