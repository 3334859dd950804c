"""The ranks of a program on this machine, as processes of its own."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

RENDEZVOUS = "MEGARLHF_RENDEZVOUS"  # environment variable: where the ranks that run_local_ranks starts find each other
INPUTS = "MEGARLHF_INPUTS"  # environment variable: where those ranks find what was prepared for them
_GRACE_SECONDS = 10.0  # for the other ranks, once one has failed
_SET_DEATH_SIGNAL = 1  # prctl(2)
_PREPARING = timedelta(days=7)  # no limit: a rank that fails is told by itself, one that is killed by its launcher


@contextmanager
def prepared_once(prepare: Callable[[Path], None], *, timeout_minutes: float) -> Iterator[Path]:
    """For a rank: a directory that `prepare` has filled once for all ranks of this machine.

    For the ranks of run_local_ranks its caller has. Under torchrun, or what sets the same variables, the machine's rank
    with LOCAL_RANK=0 does it while the others wait, and removes the directory at the end.

    Args:
        timeout_minutes: for the ranks to find each other.
    Raises:
        ValueError: on the other ranks, where `prepare` has failed on that one; there, its own error.
    """
    if INPUTS in os.environ:
        yield Path(os.environ[INPUTS])
        return
    from torch.distributed.rendezvous import rendezvous

    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=timeout_minutes)))
    first = rank - local_rank
    key = f"{INPUTS} {first}"
    if local_rank:
        store.wait([key], _PREPARING)
        directory = store.get(key).decode()
        if not directory:
            raise ValueError(f"rank {first}, which prepares the data for this one, has refused it: see what it says")
        if not Path(directory).is_dir():
            raise ValueError(
                f"RANK={rank} with LOCAL_RANK={local_rank} finds no {directory} of rank {first} (a machine's ranks "
                "follow each other in number and see the same files): start them so"
            )
        yield Path(directory)
        return
    with TemporaryDirectory(prefix="megarlhf-") as directory:
        prepared = ""
        try:
            prepare(Path(directory))
            prepared = directory
        finally:
            store.set(key, prepared)
        yield Path(directory)


def run_local_ranks(
    module: str, arguments: Sequence[str], *, world_size: int, threads: int, environment: Mapping[str, str]
) -> int:
    """Run `python -m module arguments` as ranks 0 .. world_size - 1 and return the first failure's status, or 0.

    They have this process's environment, with the variables of `environment`.
    SIGTERM and SIGUSR1 are passed on to every rank. When one rank fails the others are ended; when this process is
    killed they end with it.
    """
    with TemporaryDirectory(prefix="megarlhf-") as rendezvous:
        common = {
            "WORLD_SIZE": str(world_size),
            RENDEZVOUS: f"file://{Path(rendezvous) / 'ranks'}",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=os.environ | environment | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                preexec_fn=_die_with_parent,
            )
            for rank in range(world_size)
        ]

        def pass_on(number: int, frame: FrameType | None) -> None:
            for rank in ranks:
                rank.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, pass_on)
        return _wait(ranks)


def run_program(module: str, arguments: Sequence[str], *, should_stop: Callable[[], bool]) -> int:
    """Run `python -m module arguments` and return its status; it ends with this process.

    Once `should_stop()` is true it gets a SIGTERM, and has the time that it needs.
    """
    program = subprocess.Popen([sys.executable, "-m", module, *arguments], preexec_fn=_die_with_parent)
    told = False
    while program.poll() is None:
        if should_stop() and not told:
            told = True
            program.terminate()
        time.sleep(0.1)
    return program.returncode


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Until all have ended well, or the first has not; then the others have a moment, and are killed."""
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        time.sleep(0.1)
    status = next((rank.returncode for rank in ranks if rank.returncode), 0)
    deadline = time.monotonic() + _GRACE_SECONDS
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    for rank in ranks:
        rank.kill()
        rank.wait()
    return status
