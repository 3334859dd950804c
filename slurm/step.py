"""Runs a command as a job step that leaves no process behind, whatever the command has put into the background.

    python slurm/step.py [--grace-seconds S] [--scratch DIR] -- COMMAND...

Where Slurm tracks processes by their parents (proctrack/linuxproc, pgid), those of Ray and torchrun outlive their step.
Here they become this process's children when their parents end.

The job gives orders through srun's standard input, a word a line: srun answers SIGTERM by killing its step, and other
signals may come to every process of it. TERM, or that signal itself, ends the command: it gets SIGTERM and
--grace-seconds. Afterwards everything that has come of it is killed, and --scratch deleted, its TMPDIR. USR1, or that
signal, is for those processes that have a handler for it: the run, or each rank under torchrun. The others ignore it.
Leaves with the command's status, 128 + N where signal N has ended it.
"""

import argparse
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

_SET_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
_POLL_SECONDS = 0.1


def descendants() -> list[int]:
    """Ids of the living processes that have come of this one, parents before children."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
            if fields[0] not in "ZX":
                parents[int(entry.name)] = int(fields[1])
    found, level = [], [os.getpid()]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found += level
    return found


def handles(process: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(caught >> (number - 1) & 1)


def send(process: int, number: int) -> None:
    """A signal to a process that may have ended."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def reap() -> dict[int, int]:
    """Exit statuses of the children that have ended since the last call."""
    ended = {}
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # there is none any more
            return ended
        if process == 0:
            return ended
        code = os.waitstatus_to_exitcode(status)
        ended[process] = code if code >= 0 else 128 - code


class Orders:
    """Words from standard input, as the signals that they name."""

    def __init__(self) -> None:
        self._open, self._rest = True, b""

    def wait(self, seconds: float) -> None:
        """So long for the next ones, and send them to this process."""
        if not self._open:
            time.sleep(seconds)
        elif select.select([0], [], [], seconds)[0]:
            found = os.read(0, 4096)
            self._open = bool(found)
            *words, self._rest = (self._rest + found).split(b"\n")
            for word in words:
                signal.raise_signal(signal.Signals[f"SIG{word.decode()}"])


def run(command: list[str], *, grace_seconds: float) -> int:
    """Run a command to its end, or to that of its grace after a signal, and kill what is left; returns its status."""
    libc, orders = ctypes.CDLL(None), Orders()
    libc.prctl(_SET_CHILD_SUBREAPER, 1)
    child: int | None = None
    deadline: float | None = None

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal deadline
        if deadline is None:
            deadline = time.monotonic() + grace_seconds
        if child is not None:
            send(child, signal.SIGTERM)

    def finish(number: int, frame: FrameType | None) -> None:
        for process in descendants():
            if handles(process, number):
                send(process, number)

    def prepare() -> None:
        libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    for number, handler in ((signal.SIGTERM, end), (signal.SIGUSR1, finish)):
        signal.signal(number, handler)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=prepare).pid
    if deadline is not None:
        send(child, signal.SIGTERM)
    status = None
    while status is None and (deadline is None or time.monotonic() < deadline):
        orders.wait(_POLL_SECONDS)
        status = reap().get(child)
    while left := descendants():
        for process in left:
            send(process, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
        status = reap().get(child, status)
    return 128 + signal.SIGKILL if status is None else status


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grace-seconds", type=float, default=20.0, help="from SIGTERM to SIGKILL")
    parser.add_argument("--scratch", type=Path, help="directory to make for the command's temporary files")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    scratch = arguments.scratch
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)  # of a start whose node has lost it
        scratch.mkdir(mode=0o700)
        os.environ["TMPDIR"] = str(scratch)
    try:
        return run(arguments.command, grace_seconds=arguments.grace_seconds)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch)


if __name__ == "__main__":
    sys.exit(main())
