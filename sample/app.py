"""Serves a page to play with: base and guided image side by side, from the same noise.

    python -m sample.app --model demo
    python -m sample.app --model PATH_OR_ID --module pos=pos.safetensors --module neg=neg.safetensors --rule cpgd --w 4

The same as `flax-pref app`. It needs the extra `app`, and is reached from this machine only unless --host or --share
say otherwise; docs/app.md shows the page.
"""

import sys

from flax_pref.cli.app import main
from flax_pref.config import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
