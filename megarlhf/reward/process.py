"""The trainer's end of the reward worker: start, ask within a time limit, end."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_SECRET_MARKS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


class WorkerLostError(Exception):
    """The worker hung or ended during a request; it is gone, and the message completes a sentence on the request."""


class RewardProcess:
    """One `megarlhf.reward.worker` at a time, in its own process group, talked to in lines of JSON over pipes."""

    def __init__(self) -> None:
        """Nothing runs before `start`."""
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether a worker has been started and has not ended."""
        if self._popen is None:
            return False
        # WNOWAIT leaves an ended worker a zombie, so that no other process can have its id when `kill` uses it.
        return os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def start(self) -> None:
        """Start a worker in place of the last one."""
        self.kill()
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "megarlhf.reward.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=worker_environment(os.environ),
            start_new_session=True,
        )
        assert self._popen.stdin is not None and self._popen.stdout is not None
        os.set_blocking(self._popen.stdin.fileno(), False)
        os.set_blocking(self._popen.stdout.fileno(), False)

    def request(self, message: Mapping[str, Any], *, timeout_seconds: float) -> dict[str, Any]:
        """Send one line and wait for the line that answers it.

        Raises:
            WorkerLostError: no answer in time, or the worker ended; in both cases its whole process group is killed.
        """
        assert self._popen is not None, "request before start"
        line = json.dumps(message).encode() + b"\n"
        try:
            reply: dict[str, Any] = json.loads(_exchange(self._popen, line, timeout_seconds))
        except TimeoutError:
            self.kill()
            raise WorkerLostError(f"took longer than its limit of {timeout_seconds:g} seconds") from None
        except (BrokenPipeError, EOFError):
            code = self.kill()
            how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
            raise WorkerLostError(f"ended its process ({how})") from None
        return reply

    def kill(self) -> int:
        """End the worker, if there is one, and every process of its group.

        Returns:
            The worker's own exit status where it had ended before, or minus the number of the signal that ended it.
        """
        popen, self._popen = self._popen, None
        if popen is None:
            return 0
        assert popen.stdin is not None and popen.stdout is not None
        os.killpg(popen.pid, signal.SIGKILL)
        popen.stdin.close()
        popen.stdout.close()
        return popen.wait()


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment of the worker: ours without the variables whose names look like secrets, and with this package."""
    kept = {
        name: value for name, value in environment.items() if not any(mark in name.upper() for mark in _SECRET_MARKS)
    }
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), kept.get("PYTHONPATH")]))
    return kept


def _exchange(popen: subprocess.Popen[bytes], line: bytes, timeout_seconds: float) -> bytes:
    """Write a line and read one, both within the limit: a worker that hangs may leave either pipe as it is."""
    assert popen.stdin is not None and popen.stdout is not None
    to_worker, from_worker = popen.stdin.fileno(), popen.stdout.fileno()
    poll = select.poll()
    poll.register(to_worker, select.POLLOUT)
    poll.register(from_worker, select.POLLIN)
    deadline = time.monotonic() + timeout_seconds
    unsent, answer = memoryview(line), b""
    while not answer.endswith(b"\n"):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        for descriptor, _ in poll.poll(remaining * 1000):
            if descriptor == to_worker:
                unsent = unsent[os.write(to_worker, unsent) :]
                if not unsent:
                    poll.unregister(to_worker)
            else:
                chunk = os.read(from_worker, 1 << 16)
                if not chunk:
                    raise EOFError
                answer += chunk
    return answer
