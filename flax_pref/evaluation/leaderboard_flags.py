"""Flags of the page that merges reports. `evaluation.leaderboard` follows them."""

import dataclasses

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeaderboardFlags:
    """Merges reports into one page: a row for each method, a column for each reward."""

    reports: tyro.conf.Positional[tuple[str, ...]]
    """Folders of sample.report as FOLDER or NAME=FOLDER (default name: that of the folder)."""
    out: str = "runs/leaderboard"
    """Folder for the page."""
    title: str = "Leaderboard"
    """Title of the page."""
