"""A signal that asks a program to end is seen between two steps, and is what it was afterwards."""

import os
import signal

import jax
import numpy as np
import pytest

from flax_pref.config import run_main
from flax_pref.parallel import signals
from flax_pref.parallel.signals import PREEMPTED, StopTogether, anywhere, stopped_by


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


def test_one_process_stops_at_once():
    come = []
    stopping = StopTogether(lambda: bool(come))
    assert not stopping()
    come.append(signal.SIGTERM)
    assert stopping()


class World:
    """Two processes that make steps, with a clock of their own; process 1 is a bit slower."""

    def __init__(self, monkeypatch, seconds_per_step):
        self.told, self.now, self.asked, self.step = [False, False], [0.0, 0.0], [], 0
        self.seconds, self.process, self.answers = seconds_per_step, 0, {}
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(signals.time, "monotonic", lambda: self.now[self.process])
        monkeypatch.setattr(signals.multihost_utils, "process_allgather", self.gather)

    def gather(self, own):
        """What both say: that of the other process is had by running it up to the same call."""
        self.answers[self.process] = own
        if self.process == 0:
            self.asked.append(self.step)
            self.process = 1
            self.ended_1 = self.stopping[1]()
            self.process = 0
            return self.both
        self.both = np.stack([self.answers[0], self.answers[1]])
        return self.both

    def run(self, steps, sent):
        """The steps at which the processes end, where process 1 is told to after step `sent`; None: they do not."""
        self.stopping = []
        for number in range(2):
            self.process = number
            self.stopping.append(StopTogether(lambda number=number: self.told[number]))
        self.process = 0
        for self.step in range(1, steps + 1):
            self.told[1] = self.step >= sent
            self.now = [self.step * self.seconds, self.step * self.seconds * 1.3]
            before, self.ended_1 = len(self.asked), None
            ended = self.stopping[0]()
            if len(self.asked) == before:  # process 0 did not ask, so neither must process 1
                self.process = 1
                self.ended_1 = self.stopping[1]()
                self.process = 0
            assert ended == self.ended_1
            if ended:
                return self.step
        return None


def test_processes_stop_at_the_same_step_and_ask_each_other_about_once_in_a_second(monkeypatch):
    world = World(monkeypatch, seconds_per_step=0.01)
    assert 1000 <= world.run(2000, sent=1000) <= 1000 + 2 * 100
    assert len(world.asked) < 10 + 12  # of 10 seconds, after a few at the beginning, when steps are not known yet
    assert world.asked[0] == 1


def test_processes_whose_steps_are_long_ask_at_each(monkeypatch):
    world = World(monkeypatch, seconds_per_step=30.0)
    assert world.run(20, sent=7) == 7
    assert world.asked == list(range(1, 8))


def test_processes_that_nobody_tells_do_not_stop(monkeypatch):
    assert World(monkeypatch, seconds_per_step=0.1).run(300, sent=301) is None
