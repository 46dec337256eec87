"""Trains preference modules."""

from flax_pref.config import load_config
from flax_pref.programs import PROGRAMS


def main(arguments: list[str]) -> None:
    """Trains, or resumes."""
    config = load_config(arguments, PROGRAMS["train"].config)
    from flax_pref.compilation import set_up
    from flax_pref.parallel.hosts import join, watched
    from flax_pref.training.trainer import train

    set_up()
    join(config.hosts, config.host_timeout)
    with watched():
        train(config)
