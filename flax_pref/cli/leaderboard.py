"""Merges reports into one page: a row for each method, a column for each reward."""

from flax_pref.config import parse_flags
from flax_pref.evaluation.leaderboard_flags import LeaderboardFlags


def main(arguments: list[str]) -> None:
    """Writes the page."""
    flags = parse_flags(arguments, LeaderboardFlags)
    from flax_pref.evaluation.leaderboard import merge_reports

    print(f"wrote {merge_reports(flags) / 'leaderboard.html'} and leaderboard.json")
