"""Trains the base model of the demo world: `python -m train.base configs/demo/base.py`."""

import sys

from flax_pref.checkpoints.diffusers import save_pipeline
from flax_pref.config import check_output_folder, load_config, run_main
from flax_pref.demo.pretraining import BaseConfig, train_base


def main(arguments: list[str]) -> None:
    """Trains and writes the diffusers folder."""
    config = load_config(arguments, BaseConfig)
    check_output_folder(config.output)
    pipeline = train_base(config)
    save_pipeline(pipeline, config.output / "pipeline", dtype="float16")
    print(f"wrote {config.output / 'pipeline'}")


if __name__ == "__main__":
    sys.exit(run_main(main))
