"""Compares methods on the same prompts and seeds, from runs that `sample.score` has scored.

    python -m sample.report runs/base runs/dpo cpgd=runs/cpgd --baseline base --out runs/report
    python -m sample.report runs/base runs/dpo --votes anna.json ben.json --out runs/report

The same as `flax-pref report`. Writes report.html (the comparison, with the images side by side), vote.html (a blind
vote on the same images), report.md (for a model card), report.json, table.csv, categories.csv, features.csv, table.tex
and figures as SVG; it replaces an earlier report.
"""

import sys

from flax_pref.cli.report import main
from flax_pref.config import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
