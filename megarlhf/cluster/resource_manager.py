"""Who has the devices: phases that wake and put to sleep the roles that share them.

The only place where anything sleeps or wakes. A phase may be entered again and again; its seconds are counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from megarlhf.cluster.group import WorkerGroup
from megarlhf.metrics.timers import Timers


class ResourceManager:
    """Phases over colocated or disjoint roles.

    Args:
        training: groups that train; all awake at the start.
        rollout: the inference engines; awake at the start.
        colocated: the roles share devices, so that only the phase's own may be awake. Disjoint roles never sleep.
    """

    def __init__(self, training: list[WorkerGroup], rollout: WorkerGroup, timers: Timers, *, colocated: bool) -> None:
        self._training, self._rollout, self._timers, self._colocated = training, rollout, timers, colocated
        self._awake = {group.role: True for group in [*training, rollout]}

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """The inference engines have the devices."""
        with self._timers("rollout"):
            self._give_devices(training=False, rollout=True)
            yield

    @contextmanager
    def train(self) -> Iterator[None]:
        """The training roles have the devices."""
        with self._timers("train"):
            self._give_devices(training=True, rollout=False)
            yield

    @contextmanager
    def sync(self) -> Iterator[None]:
        """Weights move: actor and engines are awake."""
        with self._timers("sync"):
            self._give_devices(training=True, rollout=True)
            yield

    @contextmanager
    def rescue(self) -> Iterator[None]:
        """The run is failing: the engines, which may not answer, are ended; the training roles have the devices."""
        with self._timers("save"):
            self._rollout.kill()
            self._awake[self._rollout.role] = False
            self._give_devices(training=True, rollout=False)
            yield

    def _give_devices(self, *, training: bool, rollout: bool) -> None:
        if not self._colocated:
            return
        wanted = {group.role: training for group in self._training} | {self._rollout.role: rollout}
        groups = [*self._training, self._rollout]
        for group in sorted(groups, key=lambda g: wanted[g.role]):  # first make room, then take it
            if wanted[group.role] != self._awake[group.role]:
                group.call("wake" if wanted[group.role] else "sleep")
                self._awake[group.role] = wanted[group.role]
