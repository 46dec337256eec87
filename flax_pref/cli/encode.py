"""Encodes a preference set for training, once."""

from flax_pref.config import load_config
from flax_pref.programs import PROGRAMS


def main(arguments: list[str]) -> None:
    """Writes the prepared set or what it lacks, or shows what it is made from."""
    config = load_config(arguments, PROGRAMS["encode"].config)
    from flax_pref.compilation import set_up
    from flax_pref.data.encode_set import encode_set

    set_up()
    encode_set(config)
