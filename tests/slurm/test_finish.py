"""The end of a job in slurm/job.sh, with a stand-in for Slurm's answer."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

_FINISH = """
. slurm/job.sh
usr1_at=$1
finish "$2"
"""


@pytest.mark.parametrize(
    ("usr1", "status", "checkpoint", "accepts", "starts", "ends", "said"),
    [
        ("", 0, True, True, 0, 0, "the run's status is 0"),
        ("", 3, True, True, 0, 3, "the run's status is 3"),
        ("", 124, True, True, 0, 124, "the run's status is 124"),
        ("9", 0, True, True, 0, -signal.SIGKILL, "requeued, 1 more times possible"),
        ("9", 124, True, True, 1, -signal.SIGKILL, "SAVE_SECONDS=7 are over"),
        ("9", 5, True, True, 0, -signal.SIGKILL, "has failed after USR1, with status 5: the last checkpoint counts"),
        ("9", 5, False, True, 0, 5, "the run's status is 5"),
        ("9", 0, True, True, 2, 1, "not requeued again, MAX_REQUEUES=2"),
        ("9", 0, True, False, 0, 1, "error: Slurm did not requeue it; sbatch it once more with SAVE="),
    ],
)
def test_how_a_job_ends(
    tmp_path: Path, usr1: str, status: int, checkpoint: bool, accepts: bool, starts: int, ends: int, said: str
) -> None:
    """A job that Slurm takes back is ended by it; only a run that was told to stop goes back."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/bash\necho $* >> {tmp_path}/asked\n" + ("kill -9 $PPID\n" if accepts else "exit 1\n"))
    scontrol.chmod(0o755)
    if checkpoint:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4")
    given = {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "SAVE": str(tmp_path), "SLURM_JOB_ID": "77"}
    given |= {"MAX_REQUEUES": "2", "SAVE_SECONDS": "7", "GRACE_SECONDS": "1", "SLURM_RESTART_COUNT": str(starts)}
    words = ["bash", "-uc", _FINISH, "job", usr1, str(status)]
    found = subprocess.run(words, env=os.environ | given, capture_output=True, text=True, timeout=30)
    assert found.returncode == ends and said in found.stdout + found.stderr, found
    asked = tmp_path / "asked"
    assert asked.exists() == (ends == -signal.SIGKILL or not accepts)
    assert not asked.exists() or asked.read_text() == "requeue 77\n"
