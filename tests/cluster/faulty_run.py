"""A run into which faults are injected: `python -m tests.cluster.faulty_run FAULTS PROGRAM FLAG ...`.

FAULTS is a JSON list of Fault's fields, in the order in which they come about. The driver injects them, between its own
calls, so that the phase is the one that is meant; what runs is the program as a user starts it.
"""

import json
import os
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import psutil

from megarlhf.cluster.group import WorkerGroup
from megarlhf.metrics.sinks import Sinks
from megarlhf.trainers import rl
from megarlhf.trainers.state import LoopState

# The calls of each phase, by role. For a role that makes none in it the first one's counts.
CALLS = {
    "rollout": {"rollout": ("generate",)},
    "reward": {"reward": ("scores",)},
    "train": {"critic": ("update",), "actor": ("update",)},
    "sync": {"rollout": ("update_weights",), "actor": ("refresh_shared_weights", "send_weights")},
    "eval": {"rollout": ("generate",), "reward": ("scores",)},
    "save": {"actor": ("save",), "critic": ("save",)},
}
PHASES = tuple(CALLS)  # in the order of a step
ROLES = ("actor", "critic", "reward", "rollout", "function")
SMALL_BYTES = 1 << 17


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to which process, and when.

    Attributes:
        how: a signal; or "full disk", before the call: the process can write no large file, in this phase or for good.
    """

    role: str  # "function": the process of the reward function
    rank: int = 0
    phase: str
    step: int
    after_seconds: float = 0.0  # since the call
    how: Literal["SIGKILL", "SIGSTOP", "full disk", "full disk for good"] = "SIGKILL"

    @property
    def process(self) -> str:
        """Its name."""
        return self.role if self.role == "function" else f"{self.role}-{self.rank}"

    def __str__(self) -> str:
        return f"{self.how} of {self.process} in {self.phase} of step {self.step}"


class FaultInjector:
    """Waits for the moment of the next fault."""

    def __init__(self, faults: list[Fault], logs: str) -> None:
        self._left, self._logs, self._lock = faults, logs, threading.Lock()
        self._phase, self._state, self._full = "", None, 0

    def watch(self) -> None:
        """From here on."""
        show, train, submit_to = Sinks.phase, rl.train, WorkerGroup.submit_to

        def phase(sinks: Sinks, name: str) -> None:
            self._phase = {"experience": "train"}.get(name, name)
            if self._full and name != "save":
                _limit_files(self._full, resource.RLIM_INFINITY)
                self._full = 0
            show(sinks, name)

        def watched_train(config: Any, roles: Any, prompts: Any, sets: Any, state: LoopState, *others: Any) -> None:
            self._state = state
            train(config, roles, prompts, sets, state, *others)

        def watched_submit(group: WorkerGroup, rank: int, method: str, *args: Any) -> Any:
            return self._at_call(group, rank, method, lambda: submit_to(group, rank, method, *args))

        Sinks.phase, rl.train, WorkerGroup.submit_to = phase, watched_train, watched_submit  # type: ignore[method-assign]

    def _at_call(self, group: WorkerGroup, rank: int, method: str, submit: Callable[[], Any]) -> Any:
        with self._lock:  # rewards come in threads
            fault = self._left[0] if self._left else None
            if fault is None or not self._is_moment(fault, group.role.name, method):
                return submit()
            is_before = fault.how.startswith("full")
            if rank != (0 if is_before else len(group.handles) - 1):
                return submit()
            del self._left[0]
            pid = self._find(fault.process)  # it takes longer than a call may
            call = None if is_before else submit()
            time.sleep(fault.after_seconds)
            self._inject(fault, pid)
        return submit() if is_before else call

    def _is_moment(self, fault: Fault, role: str, method: str) -> bool:
        if self._state is None or self._phase != fault.phase:
            return False
        step = self._state.step + (fault.phase in ("rollout", "reward", "train"))
        calls = CALLS[fault.phase]
        called = fault.role if fault.role in calls else next(iter(calls))
        return step == fault.step and role == called and method in calls[called]

    def _inject(self, fault: Fault, pid: int) -> None:
        if fault.how.startswith("full"):
            _limit_files(pid, SMALL_BYTES)
            self._full = pid if fault.how == "full disk" else 0
        else:
            os.kill(pid, getattr(signal, fault.how))
        print(f"{fault}, at {time.time():.3f}", file=sys.stderr, flush=True)

    def _find(self, name: str) -> int:
        """Of the process, whose output goes to its own log; of reward code the innermost, which runs it."""
        children = psutil.Process().children(recursive=True)
        if name == "function":
            return [child.pid for child in children if "megarlhf.reward.worker" in child.cmdline()][-1]
        log = os.path.join(self._logs, f"{name}.log")
        found = [child for child in children if _output(child.pid) == log]
        (first,) = [child for child in found if child.ppid() not in [other.pid for other in found]]
        return first.pid


def _output(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/1")
    except OSError:  # it has ended
        return ""


def _limit_files(pid: int, most_bytes: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))


def main() -> None:
    """Watch, and run the program in this process."""
    _, faults, program, *flags = sys.argv
    save = os.path.abspath(flags[flags.index("--save") + 1])
    FaultInjector([Fault(**fault) for fault in json.loads(faults)], os.path.join(save, "logs")).watch()
    sys.argv = [program, *flags]
    runpy.run_module(f"megarlhf.cli.{program}", run_name="__main__")


if __name__ == "__main__":
    main()
