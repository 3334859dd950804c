"""What slurm/ is made of, without Slurm: steps that leave nothing behind, and ports of a job."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import until

ROOT = Path(__file__).parents[2]
STEP = [sys.executable, str(ROOT / "slurm" / "step.py"), "--grace-seconds", "1"]
# A child in another session says its id; `{}`: what it does then.
DAEMON = "import os, signal, subprocess, sys, time; print(os.getpid(), flush=True); {}; time.sleep(60)"
HEEDS = "signal.signal(signal.SIGUSR1, lambda *_: (print('heard', flush=True), os._exit(0)))"


def script(*children: str, then: str) -> list[str]:
    """A command that puts Python programs into the background, each in a session of its own, and goes on."""
    started = " ".join(f"setsid {sys.executable} -c \"{child}\" &" for child in children)
    return ["bash", "-c", f"{started} {then}"]


def lives(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def test_what_a_command_has_left_behind_goes_with_it(tmp_path: Path) -> None:
    child = DAEMON.format("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    command = script(child, then="sleep 1; mktemp; exit 7")
    scratch = tmp_path / "scratch"
    done = subprocess.run([*STEP, "--scratch", scratch, "--", *command], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 7
    daemon, file = done.stdout.split()
    assert not lives(int(daemon)) and not scratch.exists() and file.startswith(f"{scratch}/")


@pytest.mark.parametrize("how", ["signal", "word"])
def test_signals_end_the_command_and_its_daemons(how: str) -> None:
    command = script(DAEMON.format("pass"), then="exec sleep 60")
    step = subprocess.Popen([*STEP, "--", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert step.stdout is not None
    daemon = int(step.stdout.readline())
    give(step, how, signal.SIGTERM)
    assert step.wait(timeout=10) == 143
    assert not lives(daemon)


def give(step: "subprocess.Popen[str]", how: str, number: signal.Signals) -> None:
    """A signal, or the word for it."""
    if how == "signal":
        step.send_signal(number)
    else:
        assert step.stdin is not None
        step.stdin.write(number.name.removeprefix("SIG") + "\n")
        step.stdin.flush()


def test_a_command_that_does_not_heed_sigterm_has_its_grace() -> None:
    started = time.monotonic()
    step = subprocess.Popen([*STEP, "--", "bash", "-c", "trap '' TERM; echo; while :; do sleep 0.1; done"], stdout=-1)
    assert step.stdout is not None and step.stdout.readline()
    step.terminate()
    assert step.wait(timeout=10) == 137
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize("how", ["signal", "word"])
def test_usr1_goes_to_those_that_have_a_handler(how: str) -> None:
    """One that has none would die of it, also when Slurm sends it to every process."""
    command = script(DAEMON.format(HEEDS), then="wait; echo ended")
    step = subprocess.Popen([*STEP, "--", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert step.stdout is not None
    daemon = int(step.stdout.readline())
    until(lambda: "0000000000000200" in caught(daemon), 5, "a handler")
    shell = int(Path(f"/proc/{step.pid}/task/{step.pid}/children").read_text().split()[0])
    os.kill(shell, signal.SIGUSR1)
    give(step, how, signal.SIGUSR1)
    assert step.communicate(timeout=10)[0].splitlines() == ["heard", "ended"]
    assert step.returncode == 0


def caught(process: int) -> str:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    number = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return f"{number & 1 << signal.SIGUSR1 - 1:016x}"


def ports(job: int, **settings: str) -> subprocess.CompletedProcess[str]:
    """What slurm/job.sh prints for a job: its first port and how many there are."""
    command = '. slurm/site.env; . slurm/job.sh; set_ports; echo "$port $PORTS_PER_JOB"'
    given = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": str(job)} | settings
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=given, capture_output=True, text=True, check=False)


def test_jobs_have_ports_of_their_own() -> None:
    """As many jobs in a row as there are blocks of ports have nothing in common, and the next one starts again."""
    blocks = [tuple(int(word) for word in ports(4711 + i).stdout.split()) for i in range(76)]
    taken = [port for first, count in blocks[:75] for port in range(first, first + count)]
    assert len(set(taken)) == len(taken) == 75 * 300
    assert min(taken) == 10000 and max(taken) < 32768  # where the kernel's own begin
    assert blocks[75] == blocks[0]


def test_too_few_ports_are_refused() -> None:
    done = ports(1, PORTS_PER_JOB="39")
    assert done.returncode == 2 and "PORTS_PER_JOB=39: at least 40" in done.stderr
    assert ports(1, PORTS_PER_JOB="50", PORT_FIRST="20000", PORT_LAST="20048").returncode == 2
    assert ports(8, PORTS_PER_JOB="50", PORT_FIRST="20000", PORT_LAST="20149").stdout == "20100 50\n"
