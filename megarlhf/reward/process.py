"""The trainer's end of the reward worker: start, ask within a time limit, end."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
# What programs need to find themselves, their files and their cores; none of it is a secret. LC_* pass too.
PASSED_VARIABLES = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR"),
    *("PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    *("HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
)
_MAX_ANSWER_BYTES = 1 << 26  # of one call; a hundred thousand samples with reasons have less


class WorkerLostError(Exception):
    """The worker hung, ended or answered garbage; it is gone, and the message completes a sentence on the request."""


class RewardProcess:
    """One `megarlhf.reward.worker` at a time, in its own process group, talked to in lines of JSON over a socket."""

    def __init__(
        self, passed_variables: Sequence[str] = (), *, memory_bytes: int | None = None, network: bool = False
    ) -> None:
        """Nothing runs before `start`.

        Args:
            passed_variables: environment variables that the worker gets besides PASSED_VARIABLES and LC_*.
            memory_bytes: that each of its processes may have, without code and mapped files; None: all there is.
            network: whether it may use the network, where it can be kept from it.
        """
        self._passed_variables = passed_variables
        self._limits = [str(resource.RLIM_INFINITY if memory_bytes is None else memory_bytes), str(int(network))]
        self._popen: subprocess.Popen[bytes] | None = None
        self._ending = threading.Lock()
        self._num_requests = 0

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
        self._channel, its_end = socket.socketpair()
        with its_end:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "megarlhf.reward.worker", *self._limits],
                stdin=its_end.fileno(),
                stdout=its_end.fileno(),
                env=worker_environment(os.environ, self._passed_variables),
                start_new_session=True,
            )

    def request(self, message: Mapping[str, Any], *, timeout_seconds: float) -> dict[str, Any]:
        """Send one line and wait for the line that answers it.

        Raises:
            WorkerLostError: no answer in time, one that is none, or the worker ended; all that it started is killed.
        """
        assert self._popen is not None, "request before start"
        self._num_requests += 1
        line = json.dumps({**message, "id": self._num_requests}).encode() + b"\n"
        try:
            reply = json.loads(_exchange(self._channel, line, timeout_seconds))
            if not isinstance(reply, dict) or reply.pop("id", None) != self._num_requests:
                raise ValueError("not the answer to this call")
        except TimeoutError:
            self.kill()
            raise WorkerLostError(f"took longer than its limit of {timeout_seconds:g} seconds") from None
        except (ConnectionError, EOFError):
            raise WorkerLostError(f"ended its process ({_describe_end(self.kill())})") from None
        except (ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
            self.kill()
            raise WorkerLostError(f"wrote into the pipe of its process's answers ({error})") from None
        return reply

    def kill(self) -> int:
        """End the worker, if there is one, and every process of its group; in a PID namespace every process in that.

        Returns:
            The worker's own exit status where it had ended before, or minus the number of the signal that ended it.
        """
        with self._ending:
            popen, self._popen = self._popen, None
            if popen is None:
                return 0
            os.killpg(popen.pid, signal.SIGKILL)
            self._channel.close()
            return popen.wait()

    def interrupt(self) -> None:
        """Have the request that another thread waits in raise WorkerLostError soon."""
        with self._ending:  # until `kill` has waited for it, no other process can have its id
            if self._popen is not None:
                os.killpg(self._popen.pid, signal.SIGKILL)


def worker_environment(environment: Mapping[str, str], passed_variables: Sequence[str]) -> dict[str, str]:
    """Environment of the worker: of ours what it needs and what the user names, and where this package is."""
    kept = {
        name: value
        for name, value in environment.items()
        if name in PASSED_VARIABLES or name in passed_variables or name.startswith("LC_")
    }
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), kept.get("PYTHONPATH")]))
    return kept


def _describe_end(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    return signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"


def _exchange(channel: socket.socket, line: bytes, timeout_seconds: float) -> bytes:
    """Write a line and read one, both within the limit: a worker that hangs does neither."""
    deadline = time.monotonic() + timeout_seconds

    def limit_next_call() -> None:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        channel.settimeout(remaining)

    limit_next_call()
    channel.sendall(line)
    answer = bytearray()
    while not answer.endswith(b"\n"):
        if len(answer) > _MAX_ANSWER_BYTES:
            raise ValueError(f"more than {_MAX_ANSWER_BYTES} bytes without an end of line")
        limit_next_call()
        chunk = channel.recv(1 << 16)
        if not chunk:
            raise EOFError
        answer += chunk
    return bytes(answer)
