"""Phases of a run: each is shown and timed, and wakes and puts to sleep the roles that share the devices.

The only place where a role is told to sleep or wake; config/roles.py says who does in which phase. A phase may be
entered again and again.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from megarlhf.cluster.group import WorkerGroup
from megarlhf.config.roles import ENGINE_PARTS, REPLACES_WEIGHTS, EnginePart, Part, Phase
from megarlhf.metrics.timers import Timers

_Part = TypeVar("_Part", bound=str)


def _phase(name: str, devices: Phase, *, timed: bool = True) -> Callable[[Any], AbstractContextManager[None]]:
    """A method that enters a phase.

    Args:
        name: as it is shown and timed.
        devices: the column of config/roles.py that says who is awake; where nobody is, all stay as they are.
    """

    @contextmanager
    def enter(manager: "ResourceManager") -> Iterator[None]:
        manager._show(name)
        with manager._timers(name) if timed else nullcontext():
            manager._give_devices(devices)
            yield

    return enter


class ResourceManager:
    """Phases over colocated or disjoint roles; see trainers/roles.py Phases.

    Args:
        training: groups of Megatron's processes; where colocated all of them sleep at the start.
        rollout: the inference engines; awake at the start.
        show: is told the name of each phase that begins, for the progress bar.
        colocated: the roles share devices, so that only the phase's own may be awake. Disjoint roles never sleep.
    """

    rollout = _phase("rollout", "rollout")
    _last_reward = _phase("reward", "reward")
    _other_reward = _phase("reward", "judge")
    judge = _phase("eval", "judge")
    train = _phase("train", "train")
    experience = _phase("experience", "train")
    restart = _phase("sync", "rollout")
    sync = _phase("sync", "sync")
    evaluate = _phase("eval", "rollout")
    save = _phase("save", "checkpoint")
    load = _phase("load", "checkpoint", timed=False)
    export = _phase("export", "export", timed=False)

    def __init__(
        self, training: list[WorkerGroup], rollout: WorkerGroup, show: Callable[[str], None], *, colocated: bool
    ) -> None:
        self._training, self._rollout, self._show, self._colocated = list(training), rollout, show, colocated
        self._timers = Timers()
        self._awake: dict[str, tuple[Part, ...]] = {group.role.name: () for group in training}
        self._engines_awake: tuple[EnginePart, ...] = ENGINE_PARTS

    def reward(self, *, is_last: bool = True) -> AbstractContextManager[None]:
        """Responses are scored; weights that a sync replaces next are dropped."""
        return self._last_reward() if is_last else self._other_reward()

    def rescue(self) -> AbstractContextManager[None]:
        """The run is failing: what is not trained, which may not answer, is ended, and the training roles are saved."""
        self._rollout.kill()
        self._engines_awake = ()
        for group in [group for group in self._training if not group.role.trains]:
            group.kill()
            self._training.remove(group)
        return self.save()

    def seconds(self) -> dict[str, float]:
        """Metrics: of each phase since the last call, time/PHASE_seconds."""
        return self._timers.pop()

    def memory(self) -> dict[str, float]:
        """The most that each part of each training role has held so far on one of its devices, in GiB."""
        found: dict[str, float] = {}
        for group in self._training:
            ranks, name = group.call("largest_bytes"), group.role.name
            found |= {f"memory/{name}/{part}_gib": max(rank[part] for rank in ranks) / 2**30 for part in ranks[0]}
        return found

    def _give_devices(self, phase: Phase) -> None:
        wanted: dict[str, tuple[Part, ...]] = {g.role.name: g.role.awake.get(phase, ()) for g in self._training}
        engines: tuple[EnginePart, ...] = self._rollout.role.awake.get(phase, ())
        if not self._colocated or not any((engines, *wanted.values())):  # rewards without a model need no device
            return
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
