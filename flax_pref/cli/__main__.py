"""`python -m flax_pref.cli` is `flax-pref`."""

import sys

from flax_pref.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
