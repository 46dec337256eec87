"""Signals that ask a program to end: it looks for them between two steps, and ends when its work is safe."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

PREEMPTED = 75
"""Exit status of a program that was told to end before its work was done: "run me again". It is EX_TEMPFAIL of
sysexits.h, a failure that passes; schedulers can restart such a run and leave those alone that failed (1, 2) or that
their user interrupted (130)."""


@contextlib.contextmanager
def stopped_by(number: signal.Signals) -> Iterator[Callable[[], bool]]:
    """A function that tells whether the signal has come; without this it would end the program at once.

    To be entered in the main thread, after `flax_pref.parallel.hosts.join`.
    """
    come = []
    before = signal.signal(number, lambda *_: come.append(number))
    try:
        yield lambda: bool(come)
    finally:
        signal.signal(number, before)


def anywhere(come: bool) -> bool:
    """Whether it has come to any of the processes, which all ask at the same step: so they stop at the same one.

    With several processes this waits for the devices, so ask in every so many steps.
    """
    if jax.process_count() == 1:
        return come
    return bool(multihost_utils.process_allgather(np.array(come)).any())
