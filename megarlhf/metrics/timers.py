"""Wall-clock seconds of a step's phases."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megarlhf.metrics.keys import METRICS


class Timers:
    """Adds up the seconds spent in named phases until they are taken.

    with timers("rollout"): ... counts towards time/rollout_seconds, over every time the phase is entered. A phase
    inside another takes its seconds away from the outer one, so that a step's phases add up to no more than the step.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []  # keys of the phases under way, innermost last
        self._since = clock()  # when the innermost one was last entered or come back to

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the seconds of the `with` block, also of one that raises.

        Raises:
            ValueError: METRICS has no time/<phase>_seconds.
        """
        key = f"time/{phase}_seconds"
        if key not in METRICS:
            raise ValueError(f"phase={phase!r} has no metric {key!r} in megarlhf/metrics/keys.py; add it to the table")
        self._count()
        self._open.append(key)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def pop(self) -> dict[str, float]:
        """Seconds by metric key since the last call, for the phases that had any part in them."""
        self._count()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _count(self) -> None:
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
