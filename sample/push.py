"""Shares a training run, an image set or a report on the Hub, with a card.

    python -m sample.push runs/dpo --repo USER/NAME --report runs/report
    python -m sample.push runs/images --repo USER/NAME --dry-run

The same as `flax-pref push`. --dry-run writes the folder and uploads nothing; docs/sharing.md says what is in it.
"""

import sys

from flax_pref.cli.push import main
from flax_pref.config import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
