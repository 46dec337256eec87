"""Draws and scores controls of the base model, and compares methods with them."""

from flax_pref.config import parse_flags
from flax_pref.evaluation.control_flags import ControlFlags


def main(arguments: list[str]) -> None:
    """Draws, scores and compares, or does what is left of it."""
    flags = parse_flags(arguments, ControlFlags)
    from flax_pref.compilation import set_up
    from flax_pref.evaluation.run_controls import run_controls

    set_up()
    if (out := run_controls(flags)) is not None:
        print(f"\nwrote {out / 'report.html'}")
