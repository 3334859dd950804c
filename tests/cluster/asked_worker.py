"""A worker without a model, for tests of the processes themselves."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megarlhf.cluster.processes import Store


class TwoPartError(Exception):
    """It can be pickled, and not be unpickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class AskedWorker:
    """Does what it is told."""

    def __init__(self, spec: SimpleNamespace, store: Store) -> None:
        if spec.name == "actor-9":
            raise ValueError("no such rank")
        self.spec, self._store = spec, store
        self._kept: list[Any] = []

    def name(self) -> str:
        return str(self.spec.name)

    def environment(self, name: str) -> str | None:
        """A variable as the process was started with it."""
        pairs = Path("/proc/self/environ").read_text().split("\0")
        return dict(pair.split("=", 1) for pair in pairs if pair).get(name)

    def process(self) -> int:
        return os.getpid()

    def fail(self, kind: str) -> None:
        raise {
            "key": KeyError("w"),
            "two": TwoPartError("a", "b"),
            "unsent": ValueError("holds a", (number for number in range(2))),
        }[kind]

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def scores(self, given: Any) -> None:
        """Of a model that never comes to an end."""
        time.sleep(600)

    def compute(self, seconds: float) -> None:
        """Without a moment for anybody else."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass

    def exit(self, status: int) -> None:
        os._exit(status)

    def start_child(self) -> int:
        """A process of its own, that has all that it has open."""
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False).pid

    def fork_and_exit(self) -> None:
        """Leave a process behind that holds the connection."""
        if os.fork():
            os._exit(4)
        time.sleep(60)
        os._exit(0)

    def hang_up(self) -> None:
        """End the connection from here and live on."""
        socket.socket(fileno=int(sys.argv[1])).shutdown(socket.SHUT_WR)
        time.sleep(600)

    def unread(self) -> Any:
        """An answer that can be sent and not be read."""
        return TwoPartError("a", "b")

    def put(self, count: int) -> list[tuple[int, Any]]:
        """(number, reference to an array of it) of 0 .. count - 1."""
        return list(enumerate(self._store.put([np.full(1000, number) for number in range(count)])))

    def keep(self, given: tuple[str, list[Any]]) -> float:
        """Values of references inside of what is stored, kept; their sum."""
        self._kept = self._store.get(given[1])
        return float(sum(value.sum() for value in self._kept))

    def kept(self) -> float:
        return float(sum(value.sum() for value in self._kept))

    def forget(self) -> None:
        self._kept = []

    def facts(self, value: Any) -> tuple[Any, ...]:
        """Of an array that has come as a reference."""
        return value.sum(), value.shape, value.dtype.str, value.flags.writeable, value.flags.owndata

    def num_memories(self) -> int:
        """Shared memory that is open or mapped here."""
        return num_memories(os.getpid())


def num_memories(process: int) -> int:
    """Shared memory of the store that a process has open or mapped."""
    links = [os.readlink(path) for path in Path(f"/proc/{process}/fd").iterdir() if path.is_symlink()]
    maps = Path(f"/proc/{process}/maps").read_text().splitlines()
    return sum("memfd:megarlhf" in text for text in (*links, *maps))
