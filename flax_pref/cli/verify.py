"""Checks what this machine computes, and how fast."""

from flax_pref.config import parse_flags
from flax_pref.verification.verify_flags import VerifyFlags


def main(arguments: list[str]) -> None:
    """Runs the checks and prints a verdict for each."""
    flags = parse_flags(arguments, VerifyFlags)
    from flax_pref.compilation import set_up
    from flax_pref.verification.verify import verify

    set_up()
    verify(flags)
