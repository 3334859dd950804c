"""Who has the devices: phases that wake and put to sleep the roles that share them.

The only place where a role is told to sleep or wake; config/roles.py says who does in which phase. A phase may be
entered again and again; its seconds are counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from megarlhf.cluster.group import WorkerGroup
from megarlhf.config.roles import ENGINE_PARTS, REPLACES_WEIGHTS, EnginePart, Part, Phase
from megarlhf.metrics.timers import Timers

_Part = TypeVar("_Part", bound=str)


class ResourceManager:
    """Phases over colocated or disjoint roles.

    Args:
        training: groups of training processes; where colocated all of them sleep at the start.
        rollout: the inference engines; awake at the start.
        colocated: the roles share devices, so that only the phase's own may be awake. Disjoint roles never sleep.
    """

    def __init__(self, training: list[WorkerGroup], rollout: WorkerGroup, timers: Timers, *, colocated: bool) -> None:
        self._training, self._rollout, self._timers, self._colocated = training, rollout, timers, colocated
        self._awake: dict[str, tuple[Part, ...]] = {group.role.name: () for group in training}
        self._engines_awake: tuple[EnginePart, ...] = ENGINE_PARTS

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """The inference engines have the devices."""
        with self._timers("rollout"):
            self._give_devices("rollout")
            yield

    @contextmanager
    def train(self) -> Iterator[None]:
        """The training roles have the devices; the engines' weights are dropped, so a sync comes next."""
        with self._timers("train"):
            self._give_devices("train")
            yield

    @contextmanager
    def sync(self) -> Iterator[None]:
        """Weights move: the actor's and the engines' are awake, and nothing else."""
        with self._timers("sync"):
            self._give_devices("sync")
            yield

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        """The training roles' state is saved or loaded."""
        self._give_devices("checkpoint")
        yield

    @contextmanager
    def export(self) -> Iterator[None]:
        """The actor's weights are written."""
        self._give_devices("export")
        yield

    @contextmanager
    def rescue(self) -> Iterator[None]:
        """The run is failing: the engines, which may not answer, are ended, and the training roles are saved."""
        with self._timers("save"):
            self._rollout.kill()
            self._engines_awake = ()
            self._give_devices("checkpoint")
            yield

    def memory(self) -> dict[str, float]:
        """The most that each part of each training role has held so far on one of its devices, in GiB."""
        found: dict[str, float] = {}
        for group in self._training:
            ranks, name = group.call("largest_bytes"), group.role.name
            found |= {f"memory/{name}/{part}_gib": max(rank[part] for rank in ranks) / 2**30 for part in ranks[0]}
        return found

    def _give_devices(self, phase: Phase) -> None:
        if not self._colocated:
            return
        wanted: dict[str, tuple[Part, ...]] = {g.role.name: g.role.awake.get(phase, ()) for g in self._training}
        engines: tuple[EnginePart, ...] = self._rollout.role.awake.get(phase, ())
        # First make room, then take it.
        self._tell("sleep", {role: _without(self._awake[role], parts) for role, parts in wanted.items()})
        if _without(self._engines_awake, engines):
            self._rollout.call("sleep", phase not in REPLACES_WEIGHTS)  # vLLM sleeps as a whole
            self._engines_awake = ()
        self._tell("wake", {role: _without(parts, self._awake[role]) for role, parts in wanted.items()})
        self._awake = wanted
        if waking := _without(engines, self._engines_awake):
            self._rollout.call("wake", waking)
            self._engines_awake = engines

    def _tell(self, method: str, parts: dict[str, tuple[Part, ...]]) -> None:
        """Each training role that has something to do does it, all at a time."""
        told = [(group, group.submit(method, moved)) for group in self._training if (moved := parts[group.role.name])]
        for group, refs in told:
            group.wait_for(refs, method)


def _without(parts: tuple[_Part, ...], others: tuple[_Part, ...]) -> tuple[_Part, ...]:
    return tuple(part for part in parts if part not in others)
