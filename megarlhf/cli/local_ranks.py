"""The ranks of a program on this machine, as processes of its own."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

MEETING = "MEGARLHF_MEETING"  # environment variable: where the ranks that run_local_ranks starts find each other
_GRACE_SECONDS = 10.0  # for the other ranks, once one has failed
_SET_DEATH_SIGNAL = 1  # prctl(2)


def run_local_ranks(module: str, arguments: Sequence[str], *, world_size: int, threads: int) -> int:
    """Run `python -m module arguments` as ranks 0 .. world_size - 1 and return the first failure's status, or 0.

    SIGTERM and SIGUSR1 are passed on to every rank. When one rank fails the others are ended; when this process is
    killed they end with it.
    """
    with TemporaryDirectory(prefix="megarlhf-") as meeting:
        common = {
            "WORLD_SIZE": str(world_size),
            MEETING: f"file://{Path(meeting) / 'ranks'}",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
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


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Until all have ended well, or the first has not."""
    while any(rank.poll() is None for rank in ranks):
        failed = next((rank for rank in ranks if rank.poll()), None)
        if failed is not None:
            deadline = time.monotonic() + _GRACE_SECONDS
            while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
                time.sleep(0.1)
            for rank in ranks:
                rank.kill()
                rank.wait()
            return failed.returncode
        time.sleep(0.1)
    return next((rank.returncode for rank in ranks if rank.returncode), 0)
