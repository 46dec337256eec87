"""Signals that ask a program to end: it looks for them between two steps, and ends when its work is safe."""

import contextlib
import signal
import time
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


@contextlib.contextmanager
def exits_by(number: signal.Signals) -> Iterator[None]:
    """Work that has nothing to save: the signal ends the program with `PREEMPTED`. To be entered in the main thread."""

    def end(*_):
        raise SystemExit(PREEMPTED)

    before = signal.signal(number, end)
    try:
        yield
    finally:
        signal.signal(number, before)


def anywhere(come: bool) -> bool:
    """Whether it has come to any of the processes, which all ask at the same step: so they stop at the same one.

    With several processes this waits for the devices, so ask in every so many steps.
    """
    if jax.process_count() == 1:
        return come
    return bool(multihost_utils.process_allgather(np.array(come)).any())


class StopTogether:
    """Tells all processes at the same step that one of them was told to end; to be called once in each step.

    Several processes ask each other about once in a second, for that waits for the devices.
    """

    def __init__(self, come: Callable[[], bool], *, seconds: float = 1.0):
        """Begins to count steps.

        Args:
            come: whether it has come to this process; see `stopped_by`.
            seconds: between two times that the processes ask each other.
        """
        self._come, self._seconds = come, seconds
        self._left = self._steps = 1  # until they ask each other; between two times
        self._asked = time.monotonic()

    def __call__(self) -> bool:
        """Whether to end after this step."""
        if jax.process_count() == 1:
            return self._come()
        self._left -= 1
        if self._left:
            return False
        now = time.monotonic()
        steps = max(1, min(2 * self._steps, round(self._steps * self._seconds / max(now - self._asked, 1e-6))))
        # Each process may have measured another time: the first one decides when they ask again.
        answers = multihost_utils.process_allgather(np.array([self._come(), steps]))
        self._left = self._steps = int(answers[0, 1])
        self._asked = time.monotonic()
        return bool(answers[:, 0].any())
