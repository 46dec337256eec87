"""Trains preference modules: `python -m train.modules configs/demo/dpo.py`."""

import sys

from flax_pref.config import load_config, run_main
from flax_pref.parallel.hosts import join, watched
from flax_pref.training.trainer import TrainConfig, train


def main(arguments: list[str]) -> None:
    """Trains, or goes on."""
    config = load_config(arguments, TrainConfig)
    join(config.hosts, config.host_timeout)
    with watched():
        train(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
