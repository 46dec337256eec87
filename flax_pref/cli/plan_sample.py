"""Plans sampling for a TPU slice that is not there: memory, work and time of every chip."""

from flax_pref.config import parse_flags
from flax_pref.planning.plan_flags import SamplingPlanFlags


def main(arguments: list[str]) -> None:
    """Prints the plan, or a table of several."""
    flags = parse_flags(arguments, SamplingPlanFlags)
    from flax_pref.compilation import set_up
    from flax_pref.planning.requests import plan_sampling

    set_up()
    plan_sampling(flags, arguments)
