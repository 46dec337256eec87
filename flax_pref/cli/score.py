"""Scores finished folders of images, or the pairs of prepared sets, with rewards."""

from flax_pref.config import parse_flags
from flax_pref.evaluation.score_flags import ScoreFlags


def main(arguments: list[str]) -> None:
    """Scores what is not scored yet, and prints the means."""
    flags = parse_flags(arguments, ScoreFlags)
    from flax_pref.compilation import set_up
    from flax_pref.evaluation.run_scoring import score_runs

    set_up()
    score_runs(flags)
