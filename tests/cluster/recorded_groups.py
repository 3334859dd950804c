"""Groups of worker processes without processes: they note who was called with what, in one list for all groups."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megarlhf.cluster.rank_seconds import RankSeconds
from megarlhf.config.roles import ROLES

Reply = Callable[[int, tuple[Any, ...]], Any]  # rank and arguments -> that rank's answer


class RecordedGroup:
    """In the place of a WorkerGroup.

    Args:
        log: (role, method, arguments) of every call, shared by the groups of a test.
        replies: method -> answer of each rank; None where it is missing.
    """

    def __init__(
        self, role: str, log: list[tuple[str, str, tuple[Any, ...]]], *, ranks: int = 1, **replies: Reply
    ) -> None:
        self.role, self._log, self._replies = ROLES[role], log, replies
        self.handles, self.loads, self.seconds = list(range(ranks)), 0, RankSeconds()

    def call(self, method: str, *args: Any) -> list[Any]:
        self._log.append((self.role.name, method, args))
        return [self._answer(method, rank, args) for rank in range(len(self.handles))]

    def submit(self, method: str, *args: Any) -> list[Any]:
        self._log.append((self.role.name, method, args))
        return [partial(self._answer, method, rank, args) for rank in range(len(self.handles))]

    def submit_to(self, rank: int, method: str, *args: Any) -> Any:
        self._log.append((f"{self.role.name} {rank}", method, args))
        return partial(self._answer, method, rank, args)

    def first_of(self, calls: Mapping[Any, float]) -> Any:
        return min(calls, key=lambda call: calls[call])

    def wait_for(
        self, refs: Sequence[Any], what: str, *, ranks: Sequence[int] | None = None, since: float | None = None
    ) -> list[Any]:
        return [answer() for answer in refs]

    def kill(self) -> None:
        self._log.append((self.role.name, "kill", ()))

    def _answer(self, method: str, rank: int, args: tuple[Any, ...]) -> Any:
        return self._replies[method](rank, args) if method in self._replies else None


class TimedEngines(RecordedGroup):
    """Engines by a clock of their own, that answer a prompt in so many seconds each.

    Attributes:
        pieces: rank, first place and seconds from the start to the end of each piece, in the order of their ends.
    """

    def __init__(self, log: list[tuple[str, str, tuple[Any, ...]]], seconds: Sequence[float], **replies: Reply) -> None:
        super().__init__("rollout", log, ranks=len(seconds), **replies)
        self._seconds, self._now, self._ends = seconds, 0.0, dict[Any, tuple[float, int, int]]()
        self.pieces: list[tuple[int, int, float]] = []

    def submit_to(self, rank: int, method: str, *args: Any) -> Any:
        call = super().submit_to(rank, method, *args)
        self._ends[call] = self._now + self._seconds[rank] * len(args[0]), rank, args[1][0]
        return call

    def first_of(self, calls: Mapping[Any, float]) -> Any:
        first = min(calls, key=lambda call: self._ends[call])
        self._now, rank, place = self._ends[first]
        self.pieces.append((rank, place, self._now))
        return first


def makes_directory(rank: int, args: tuple[Any, ...]) -> None:
    """A role's save: its first rank makes the directory."""
    if rank == 0:
        Path(args[0]).mkdir()
        (Path(args[0]) / "weights").write_text("w")
