"""What this folder asks of worker processes, be they Ray's (ray_processes.py) or children (local_processes.py)."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class ProcessError(RuntimeError):
    """A call has no result."""


class ProcessDiedError(ProcessError):
    """The process has ended."""


class ValueLostError(ProcessError):
    """The call asked for values that are lost with the process that stored them; its own process is well."""


class CallFailedError(ProcessError):
    """The call raised."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(cause)
        self.cause = cause


class Store(Protocol):
    """Values in memory that all processes of a host read: arrays are not copied, and may not be written to.

    A reference goes to another process inside of arguments, results or stored values. A value is there for as long as
    somebody has a reference to it, or an array of it; in Ray's store also no longer than the process that stored it.
    """

    def put(self, values: Sequence[Any]) -> list[Any]:
        """Keep values; a reference to each."""

    def get(self, references: Sequence[Any]) -> list[Any]:
        """The values of references."""


class Processes(Protocol):
    """Starts worker processes and asks them. A handle is a process; a call is what it has been asked for."""

    @property
    def store(self) -> Store:
        """What its workers read and write too."""

    @property
    def device_names(self) -> Mapping[tuple[int, int], str]:
        """Of GPUs, by node and the plan's number; empty on CPUs."""

    @property
    def addresses(self) -> Mapping[int, str]:
        """At which nodes reach each other, by the plan's number; empty where there is one."""

    def has_lost(self, node: int) -> bool:
        """Whether a node of the plan has gone, with its processes and the room for others."""

    def start(self, worker: Any, spec: Any, environment: Mapping[str, str]) -> Any:
        """A process that makes worker(spec, store), with these variables from its first instruction on; its handle."""

    def submit(self, handle: Any, method: str, *args: Any) -> Any:
        """Ask for a method of the worker; calls of one process come one after the other.

        Args:
            args: those that are references arrive as their values.
        """

    def wait(self, calls: Sequence[Any], *, all_of_them: bool, timeout_seconds: float) -> tuple[list[Any], list[Any]]:
        """Until one call has ended, or all have, or time is up; those that have and those that have not."""

    def result(self, call: Any) -> Any:
        """Of a call that has ended.

        Raises:
            ProcessError: it has none.
        """

    def kill(self, handle: Any) -> None:
        """End a process at once."""

    def collect_logs(self) -> None:
        """Have what workers have written until now in the files of their logs."""
