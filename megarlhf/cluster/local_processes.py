"""Worker processes as child processes of this one, on this machine.

A child has one end of a socket pair: no port listens, and nobody else can talk to it. It ends when the other end is
closed, which it is when this process ends in whatever way.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_connections
from typing import Any

from megarlhf.cluster.local_store import LocalStore
from megarlhf.cluster.processes import CallFailedError, ProcessDiedError, ProcessError, Processes
from megarlhf.parallel.device import local_device_names

_ENDING_SECONDS = 5.0  # from a closed connection to the end of the process


@contextmanager
def local_processes() -> Iterator[Processes]:
    """Child processes; they end with the block."""
    processes = LocalProcesses()
    try:
        yield processes
    finally:
        processes.close()


class LocalProcess:
    """A child process, which a thread of its own asks one thing at a time."""

    def __init__(self, worker: Any, spec: Any, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "megarlhf.cluster.local_worker", str(theirs.fileno()), spec.name],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # with what it starts it is a group, which is ended as one
            )
        self._connection, self._ending = Connection(ours.detach()), os.pidfd_open(self._child.pid)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._thread.submit(self._connection.send_bytes, pickle.dumps((worker, spec), protocol=5))

    def submit(self, method: str, args: tuple[Any, ...]) -> Future[Any]:
        """Ask for a method; the arguments are kept until it has answered."""
        return self._thread.submit(self._ask, method, args)

    def _ask(self, method: str, args: tuple[Any, ...]) -> Any:
        try:
            self._connection.send_bytes(pickle.dumps((method, args), protocol=5))
            wait_for_connections([self._connection, self._ending])
            if not self._connection.poll():  # what it has started may hold its end of the connection open
                raise EOFError
            reply = self._connection.recv_bytes()
        except (EOFError, OSError):
            if not wait_for_connections([self._ending], _ENDING_SECONDS):
                self.kill()  # it lives, and nobody can ask it any more
            ended = os.waitid(os.P_PIDFD, self._ending, os.WEXITED | os.WNOWAIT)  # it is waited for in close
            assert ended is not None
            by_itself = ended.si_code == os.CLD_EXITED
            how = f"exit status {ended.si_status}" if by_itself else f"by {signal.Signals(ended.si_status).name}"
            raise ProcessDiedError(f"the process has ended, {how}") from None
        try:
            succeeded, answer = pickle.loads(reply)
        except Exception as error:  # of whatever class the answer holds
            raise ProcessError(f"its answer cannot be read: {type(error).__name__}: {error}") from error
        if not succeeded:
            raise CallFailedError(answer)
        return answer

    def kill(self) -> None:
        """End it and what it has started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)

    def close(self) -> None:
        """After `kill`: until it has ended."""
        self._thread.shutdown()
        self._child.wait()
        self._connection.close()
        os.close(self._ending)


class LocalProcesses:
    """See Processes; `close` ends all."""

    def __init__(self) -> None:
        self.store, self._started = LocalStore(), list[LocalProcess]()
        self.addresses: dict[int, str] = {}
        self.device_names = {(0, number): name for number, name in enumerate(local_device_names())}

    def has_lost(self, node: int) -> bool:
        """See Processes."""
        return False

    def start(self, worker: Any, spec: Any, environment: Mapping[str, str]) -> LocalProcess:
        """See Processes."""
        self._started.append(LocalProcess(worker, spec, environment))
        return self._started[-1]

    def submit(self, handle: LocalProcess, method: str, *args: Any) -> Future[Any]:
        """See Processes."""
        return handle.submit(method, args)

    def wait(
        self, calls: Sequence[Future[Any]], *, all_of_them: bool, timeout_seconds: float
    ) -> tuple[list[Future[Any]], list[Future[Any]]]:
        """See Processes."""
        when = ALL_COMPLETED if all_of_them else FIRST_COMPLETED
        ended, _ = wait_for_futures(calls, timeout=max(0.0, timeout_seconds), return_when=when)
        return [call for call in calls if call in ended], [call for call in calls if call not in ended]

    def result(self, call: Future[Any]) -> Any:
        """See Processes."""
        return call.result()

    def kill(self, handle: LocalProcess) -> None:
        """See Processes."""
        handle.kill()

    def collect_logs(self) -> None:
        """See Processes; they write there."""

    def close(self) -> None:
        """End all processes."""
        for process in self._started:
            process.kill()
        while self._started:
            self._started.pop().close()
