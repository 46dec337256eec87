"""One of two hosts that start programs with different flags, one pair of programs after another.

`python mismatched_hosts.py HOSTS CASES`: CASES is a JSON file of lists `[name, program, flags of host 0, flags of host
1]`. Of each a JSON line is printed: the name, the error of this host or null, and the seconds.
"""

import contextlib
import importlib
import json
import sys
import time
from pathlib import Path

import jax

from flax_pref.config import UserError
from flax_pref.parallel import agreement, hosts

agreement.PAUSE = 0.0  # nobody ends here
process, processes = hosts.join(sys.argv[1], 60)
with hosts.watched():
    # The two stay together through all programs, which would each join and leave: before any of them is imported.
    hosts.join, hosts.watched = lambda *_: (process, processes), contextlib.nullcontext
    for name, program, *flags in json.loads(Path(sys.argv[2]).read_text()):
        module = importlib.import_module(program)
        begun, error = time.monotonic(), None
        try:
            module.main(flags[process])
        except UserError as refused:
            error = str(refused)
        print(json.dumps({"name": name, "error": error, "seconds": time.monotonic() - begun}), flush=True)
        assert jax.process_count() == processes
