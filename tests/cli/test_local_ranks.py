"""What is prepared for ranks that torchrun, or another launcher with its variables, has started."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megarlhf.cli.local_ranks import INPUTS, prepared_once

ROOT = Path(__file__).resolve().parents[2]

# Prepares, or refuses to where told so, and says what it has found; all wait for each other before they end.
RANK = """
import os, sys, time
from pathlib import Path
from megarlhf.cli.local_ranks import prepared_once
rank, said = os.environ["RANK"], Path(sys.argv[1])
def prepare(directory):
    if rank == sys.argv[2]:
        raise ValueError("no data")
    (directory / "rows").write_text("by rank " + rank)
try:
    with prepared_once(prepare, timeout_minutes=1) as directory:
        found = str(directory) + " " + (directory / "rows").read_text()
        (said / ("reached " + rank)).touch()
        while len(list(said.glob("reached *"))) < 4:
            time.sleep(0.01)
except ValueError as error:
    found = str(error)
    (said / ("reached " + rank)).touch()
    while len(list(said.glob("reached *"))) < 4:
        time.sleep(0.01)
(said / rank).write_text(found)
"""


def test_one_rank_of_each_machine_prepares_for_the_others(tmp_path: Path) -> None:
    """Four processes as two machines, the second of which cannot; each imports PyTorch, about 2 s."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "4"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), "2"],
            cwd=ROOT,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)},
        )
        for rank in range(4)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * 4
    directory, _, text = (tmp_path / "0").read_text().partition(" ")
    assert text == "by rank 0"
    assert (tmp_path / "1").read_text() == f"{directory} by rank 0"
    assert not Path(directory).exists()
    assert (tmp_path / "2").read_text() == "no data"
    assert (tmp_path / "3").read_text().startswith("rank 2, which prepares the data for this one, has refused it")


def test_ranks_of_run_local_ranks_find_what_was_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(directory: Path) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setenv(INPUTS, str(tmp_path))
    with prepared_once(prepare, timeout_minutes=1) as directory:
        assert directory == tmp_path
