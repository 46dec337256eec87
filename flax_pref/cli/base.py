"""Trains the base model of the demo world."""

from flax_pref.config import check_output_folder, load_config
from flax_pref.files import one_writer, writing
from flax_pref.programs import PROGRAMS


def main(arguments: list[str]) -> None:
    """Trains and writes the diffusers folder."""
    config = load_config(arguments, PROGRAMS["base"].config)
    from flax_pref.checkpoints.diffusers import save_pipeline
    from flax_pref.compilation import set_up
    from flax_pref.demo.pretraining import train_base

    set_up()
    check_output_folder(config.output)
    with one_writer(config.output), writing(config.output):
        save_pipeline(train_base(config), config.output / "pipeline", dtype="float16")
    print(f"wrote {config.output / 'pipeline'}")
