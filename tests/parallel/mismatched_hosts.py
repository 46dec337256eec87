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
from flax_pref.parallel import agreement
from flax_pref.parallel.hosts import join, watched

agreement.PAUSE = 0.0  # nobody ends here
process, processes = join(sys.argv[1], 60)
with watched():
    for name, program, *flags in json.loads(Path(sys.argv[2]).read_text()):
        module = importlib.import_module(program)
        module.join, module.watched = lambda *_: (process, processes), contextlib.nullcontext
        begun, error = time.monotonic(), None
        try:
            module.main(flags[process])
        except UserError as refused:
            error = str(refused)
        print(json.dumps({"name": name, "error": error, "seconds": time.monotonic() - begun}), flush=True)
        assert jax.process_count() == processes
