"""A signal that asks a program to end is seen between two steps, and is what it was afterwards."""

import os
import signal

import pytest

from flax_pref.config import run_main
from flax_pref.parallel.signals import PREEMPTED, anywhere, stopped_by


def test_a_signal_is_told_and_does_not_end_the_program():
    before = signal.getsignal(signal.SIGTERM)
    with stopped_by(signal.SIGTERM) as stop:
        assert not stop() and not anywhere(stop())
        for _ in range(2):  # some send it again
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop() and anywhere(stop())
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_leaves_the_signal_as_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="a loss"), stopped_by(signal.SIGTERM):
        raise ValueError("a loss")
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_status_of_a_preempted_program_is_no_other_one():
    assert PREEMPTED not in (0, 1, 2, 130)  # success, failure, wrong flags, interrupt

    def main(arguments):
        raise SystemExit(PREEMPTED)

    with pytest.raises(SystemExit) as exit:
        run_main(main)
    assert exit.value.code == PREEMPTED
