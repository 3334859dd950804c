"""Groups of worker processes: calls with a time limit, and errors that name the role, the rank and its last words."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megarlhf.cluster.processes import CallFailedError, ProcessDiedError, ProcessError, Processes, ValueLostError
from megarlhf.cluster.rank_seconds import PHASES, RankSeconds
from megarlhf.cluster.workers import WorkerSpec
from megarlhf.config.roles import RoleSpec
from megarlhf.engine.objective import NonFiniteError
from megarlhf.formats.run_checkpoints import SaveFailedError
from megarlhf.trainers.roles import RoleFailedError

_LAST_LINES = 15
_DEATH_SECONDS = 5.0  # after one rank's error, to notice that it was another's death


class WorkerFailedError(RoleFailedError):
    """A worker process died, raised, or did not answer in time."""


class WorkerGroup:
    """The processes of one role, called together.

    Args:
        launch: starts a process, and gives its handle, as `handles` were.

    Attributes:
        started: what each rank's `start` has returned, once they are up.
        loads: how often since then models were loaded anew, which know nothing of where weights come from.
        seconds: what ranks take for calls that compute.
    """

    def __init__(
        self,
        role: RoleSpec,
        processes: Processes,
        handles: Sequence[Any],
        specs: Sequence[WorkerSpec],
        *,
        launch: Callable[[WorkerSpec], Any],
        timeout_seconds: float,
    ) -> None:
        self.role, self.handles, self.specs, self._launch = role, list(handles), list(specs), launch
        self.timeout_seconds = timeout_seconds
        self.started: list[Any] = []
        self.loads, self.seconds = 0, RankSeconds()
        self._processes = processes

    def call(self, method: str, *args: Any, timeout_seconds: float | None = None) -> list[Any]:
        """Call a method on every process with the same arguments; results in rank order.

        Raises:
            WorkerFailedError: see wait_for.
        """
        return self.wait_for(self.submit(method, *args), method, timeout_seconds=timeout_seconds)

    def submit(self, method: str, *args: Any) -> list[Any]:
        """Start a call on every process; large arguments are stored once."""
        stored = [self.put([a])[0] if isinstance(a, list | dict) else a for a in args]
        return [self.submit_to(rank, method, *stored) for rank in range(len(self.handles))]

    def submit_to(self, rank: int, method: str, *args: Any) -> Any:
        """Start a call on one process; arguments that are references arrive as their values."""
        return self._processes.submit(self.handles[rank], method, *args)

    def put(self, values: Sequence[Any]) -> list[Any]:
        """Store values for the processes; a reference to each."""
        return self._processes.store.put(values)

    def wait_for(
        self,
        refs: Sequence[Any],
        what: str,
        *,
        ranks: Sequence[int] | None = None,
        timeout_seconds: float | None = None,
        since: float | None = None,
    ) -> list[Any]:
        """Results of calls, in the order of `refs`.

        Args:
            ranks: of each call; None: those of the first ranks.
            since: time.monotonic() from which the limit counts; None: now.
        Raises:
            WorkerFailedError: the first failure, at once, whatever other ranks still wait for; or the limit is past.
            NonFiniteError: every rank of the role found a loss or gradient that is not finite.
            SaveFailedError: every rank of the role knows that one could not write.
        """
        limit = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        rank_of = dict(zip(refs, range(len(refs)) if ranks is None else ranks, strict=True))
        start = time.monotonic() if since is None else since
        deadline = start + limit
        pending, results = list(refs), dict[Any, Any]()
        while pending:
            left = deadline - time.monotonic()
            done, pending = self._processes.wait(pending, all_of_them=False, timeout_seconds=left)
            if not done:
                late = [rank_of[ref] for ref in pending]
                raise self._failure(f"ranks {late} did not finish {what} within {limit:g} s", late[0])
            try:
                results |= {ref: self._result(ref, rank_of[ref], what) for ref in done}
            except WorkerFailedError:
                self._raise_if_one_died(rank_of, what)  # the others only notice
                raise
            for ref in done if what in PHASES else ():
                taken = getattr(results[ref], "seconds", time.monotonic() - start)  # an answer may know its own
                self.seconds.note(PHASES[what], rank_of[ref], taken)
        return [results[ref] for ref in refs]

    def first_of(self, calls: Mapping[Any, float]) -> Any:
        """The call that ends first, or is past its limit; wait_for says which.

        Args:
            calls: with time.monotonic() of when each was submitted.
        """
        oldest = min(calls, key=lambda call: calls[call])
        left = calls[oldest] + self.timeout_seconds - time.monotonic()
        done, _ = self._processes.wait(list(calls), all_of_them=False, timeout_seconds=left)
        return done[0] if done else oldest

    def _raise_if_one_died(self, rank_of: Mapping[Any, int], what: str) -> None:
        done, _ = self._processes.wait(list(rank_of), all_of_them=True, timeout_seconds=_DEATH_SECONDS)
        for ref in done:
            try:
                self._processes.result(ref)
            except ProcessDiedError:
                self._result(ref, rank_of[ref], what)
            except ProcessError:
                continue

    def _result(self, ref: Any, rank: int, what: str) -> Any:
        try:
            return self._processes.result(ref)
        except ProcessDiedError as error:
            raise self._failure(f"rank {rank}{self._where(rank)} died during {what}: {error}", rank) from None
        except CallFailedError as error:
            cause = error.cause
            if isinstance(cause, NonFiniteError | SaveFailedError):
                raise type(cause)(f"{self.role.name}: {cause}") from error
            raise self._failure(f"rank {rank} failed in {what}: {type(cause).__name__}: {cause}", rank) from error
        except ValueLostError as error:
            raise WorkerFailedError(f"{self.role.name} rank {rank} failed in {what}: {error}", trains=False) from error
        except ProcessError as error:
            raise self._failure(f"rank {rank}: {what}: {error}", rank) from error

    def _where(self, rank: int) -> str:
        address = self._processes.addresses.get(self.specs[rank].node)
        return f" on node {address}" if address else ""

    def _failure(self, said: str, rank: int) -> WorkerFailedError:
        return WorkerFailedError(f"{self.role.name} {said}" + self._last_words(rank), trains=self.role.trains)

    def _last_words(self, rank: int) -> str:
        self._processes.collect_logs()
        path = Path(self.specs[rank].log_file)
        if not path.is_file():
            return ""
        with path.open(errors="replace") as file:
            lines = deque(file, maxlen=_LAST_LINES)
        return f"\nlast lines of {path}:\n" + "".join(f"  {line}" for line in lines)

    def has_ended(self, call: Any, *, within_seconds: float) -> bool:
        """Whether a call has an answer, or fails, in that time."""
        ended, _ = self._processes.wait([call], all_of_them=True, timeout_seconds=within_seconds)
        return bool(ended)

    def can_restart(self, rank: int) -> bool:
        """Whether its node is there."""
        return not self._processes.has_lost(self.specs[rank].node)

    def restart(self, rank: int) -> None:
        """End a process, and start another in its place."""
        self._processes.kill(self.handles[rank])
        self.handles[rank] = self._launch(self.specs[rank])
        self.loads += 1

    def kill(self) -> None:
        """End the processes."""
        for handle in self.handles:
            self._processes.kill(handle)


Calls = tuple[WorkerGroup, str, dict[int, Any]]  # a method, and its call on each of these ranks


def wait_for_each(calls: Sequence[Calls], *, noticing: type[Exception]) -> list[list[Any]]:
    """Results of calls on several groups whose processes wait for each other.

    Args:
        noticing: what those raise that only notice the loss of another one.
    Raises:
        WorkerFailedError: of the process at fault, at once or when the limits of the others are past: one that died,
            else one that failed for a reason of its own, else one that says nothing while others fail.
    """
    every = [(group, what, rank, ref) for group, what, refs in calls for rank, ref in refs.items()]
    processes, pending = calls[0][0]._processes, [ref for *_, ref in every]
    deadline, errors = time.monotonic() + max(group.timeout_seconds for group, *_ in calls), dict[Any, ProcessError]()
    while pending and not errors:
        left = deadline - time.monotonic()
        done, pending = processes.wait(pending, all_of_them=False, timeout_seconds=left)
        if not done:
            break
        errors = _errors(processes, done)
    if pending or errors:
        done, late = processes.wait([ref for *_, ref in every], all_of_them=True, timeout_seconds=_DEATH_SECONDS)
        errors = _errors(processes, done)
        failed = [call for call in every if call[-1] in errors]
        dead = [call for call in failed if isinstance(errors[call[-1]], ProcessDiedError)]
        own = [call for call in failed if not isinstance(getattr(errors[call[-1]], "cause", None), noticing)]
        for group, what, rank, ref in dead or own:
            group._result(ref, rank, what)
        for group, what, rank, _ in [call for call in every if call[-1] in late]:
            raise group._failure(f"rank {rank} did not finish {what}, and others waited for it in vain", rank)
    return [group.wait_for(list(refs.values()), what, ranks=list(refs)) for group, what, refs in calls]


def _errors(processes: Processes, ended: Sequence[Any]) -> dict[Any, ProcessError]:
    """Of those calls that have failed."""
    found = {}
    for ref in ended:
        try:
            processes.result(ref)
        except ProcessError as error:
            found[ref] = error
    return found
