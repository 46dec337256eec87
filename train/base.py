"""Trains the base model of the demo world: `python -m train.base configs/demo/base.py`."""

import sys

from flax_pref.checkpoints.diffusers import save_pipeline
from flax_pref.config import check_output_folder, load_config, run_main
from flax_pref.demo.pretraining import BaseConfig, train_base
from flax_pref.files import one_writer, writing


def main(arguments: list[str]) -> None:
    """Trains and writes the diffusers folder."""
    config = load_config(arguments, BaseConfig)
    check_output_folder(config.output)
    with one_writer(config.output), writing(config.output):
        save_pipeline(train_base(config), config.output / "pipeline", dtype="float16")
    print(f"wrote {config.output / 'pipeline'}")


if __name__ == "__main__":
    sys.exit(run_main(main))
