"""Real gloo ranks for tests: processes that live as long as the test session and form a new world for each call."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_TIMEOUT_SECONDS = 300.0


def _serve(connection: Connection, rank: int) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        message = connection.recv()
        if message is None:
            return
        function, world_size, port, arguments = message
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store at that port is the test session's
        try:
            connection.send((True, function(rank, world_size, f"tcp://127.0.0.1:{port}", *arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class RankPool:
    """Processes for ranks; run(world_size, f, ...) calls f(rank, world_size, init_method, ...) on the first ones."""

    def __init__(self) -> None:
        from megarlhf.parallel.device import device_kind  # here: the tests that need no rank do without torch

        os.environ["OMP_NUM_THREADS"] = "1"
        # Ranks are forks of one process that has imported everything; a process that has asked for GPUs must not fork.
        self._context: Any = multiprocessing.get_context("spawn" if device_kind() == "gpu" else "forkserver")
        self._context.set_forkserver_preload(["tests.distributed.cases"])
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def _grow(self, size: int) -> None:
        for rank in range(len(self._pipes), size):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs, rank))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results in rank order; the first rank's traceback is raised."""
        from torch.distributed import TCPStore

        if not all(process.is_alive() for process in self._processes):
            self.close()  # a test has cost a rank its life; the next ones get new ranks
        self._grow(world_size)
        # Held from here on. A port that is only looked up may be taken before rank 0 listens there, by a connection of
        # any process of the machine, and then the other ranks wait for answers of a stranger.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for pipe in self._pipes[:world_size]:
            pipe.send((function, world_size, store.port, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes[:world_size]):
            if not pipe.poll(_TIMEOUT_SECONDS):
                self.close()
                raise TimeoutError(f"rank {rank} of {world_size} did not answer")
            try:
                results.append(pipe.recv())
            except EOFError:
                self._processes[rank].join(10)  # its end of the pipe closes a little before it has an exit code
                results.append((False, f"rank {rank} died with exit code {self._processes[rank].exitcode}"))
        failed = [(rank, text) for rank, (fine, text) in enumerate(results) if not fine]
        if failed:
            raise RuntimeError("\n".join(f"rank {rank}:\n{text}" for rank, text in failed))
        return [value for _, value in results]

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                try:
                    pipe.send(None)
                except BrokenPipeError:
                    process.kill()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._pipes, self._processes = [], []
