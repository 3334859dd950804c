"""Timers on a clock set by hand."""

import pytest

from megarlhf.metrics.timers import Timers


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_seconds_add_up_until_they_are_popped() -> None:
    clock = Clock()
    timers = Timers(clock)
    for seconds in (2.0, 3.0):
        with timers("rollout"):
            clock.now += seconds
        clock.now += 100.0
    assert timers.pop() == {"time/rollout_seconds": 5.0}
    assert timers.pop() == {}


def test_a_phase_inside_another_takes_its_seconds_away() -> None:
    clock = Clock()
    timers = Timers(clock)
    with timers("train"):
        clock.now += 1.0
        with timers("experience"):
            clock.now += 20.0
        clock.now += 2.0
        assert timers.pop() == {"time/train_seconds": 3.0, "time/experience_seconds": 20.0}
        clock.now += 4.0
    assert timers.pop() == {"time/train_seconds": 4.0}


def test_a_phase_that_fails_is_counted() -> None:
    clock = Clock()
    timers = Timers(clock)
    with pytest.raises(RuntimeError), timers("train"):
        clock.now += 4.0
        raise RuntimeError
    assert timers.pop() == {"time/train_seconds": 4.0}


def test_phase_without_a_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="phase='rolout'.*time/rolout_seconds"), Timers()("rolout"):
        pass
