"""Merges reports of `sample.report` into one page: a row for each method, a column for each reward.

    python -m sample.leaderboard runs/report-parti runs/report-hpd --out runs/leaderboard

The same as `flax-pref leaderboard`. Writes leaderboard.html, one file with intervals, sorting and filters, and
leaderboard.json.
"""

import sys

from flax_pref.cli.leaderboard import main
from flax_pref.config import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
