"""Says on stderr what a program waits for, where that takes long.

    with clock("waiting for the other processes"):
        ...

On a terminal a line with the seconds runs, and is gone when the wait is over. Elsewhere, as in a log, lines come after
5 seconds, 10, 20 and so on.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

PATIENCE = 5.0
"""Seconds of a wait of which nothing is said."""


def say(line: str) -> None:
    """A line on stderr, above progress bars."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


@contextlib.contextmanager
def clock(text: str | Callable[[], str], then: str = "") -> Iterator[None]:
    """Says `TEXT for N s` and what is told then, now and then, as long as the work inside takes.

    Args:
        text: what is waited for; where that changes, a function that tells it.
        then: follows the seconds.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_run, args=(text, then, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _run(text: str | Callable[[], str], then: str, ended: threading.Event) -> None:
    began, pause, line = time.monotonic(), PATIENCE, None
    while not ended.wait(pause):
        seconds = time.monotonic() - began
        told = f"{text if isinstance(text, str) else text()} for {seconds:.0f} s{then}"
        if sys.stderr.isatty():
            line, pause = tqdm(bar_format="{desc}", leave=False) if line is None else line, 1.0
            line.set_description_str(told)
        else:
            say(told)
            pause = seconds
    if line is not None:
        line.close()
