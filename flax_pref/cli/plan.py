"""Plans training or encoding for a TPU slice that is not there: memory, work and time of every chip."""

from flax_pref.config import load_config
from flax_pref.planning.plan_flags import PlanFlags, own_flags
from flax_pref.programs import PROGRAMS


def main(arguments: list[str]) -> None:
    """Prints the plan, or a table of several."""
    flags, others = own_flags(arguments, PlanFlags)
    config = load_config(others, PROGRAMS["train"].config, PROGRAMS["encode"].config)
    from flax_pref.compilation import set_up
    from flax_pref.planning.requests import plan_training

    assert flags is not None  # with --help, reading the config has ended the program
    set_up()
    plan_training(flags, config, arguments)
