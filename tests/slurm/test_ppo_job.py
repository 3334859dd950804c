"""slurm/ppo_ray.sbatch on the demo's task: two pipeline stages on two nodes, the engine on the second."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, until

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
ROOT = Path(__file__).parents[2]
LAUNCHER = "tests/slurm/sort.sh"
STEPS = 6
SETTINGS = {"RAY_OBJECT_STORE_BYTES": "200000000", "RAY_NUM_CPUS": "2", "OMP_NUM_THREADS": "1"}
SLOW = {"GRACE_SECONDS": "20", "SAVE_SECONDS": "200"}  # whatever else the machine does


def weights(save: Path) -> bytes:
    return (save / "hf" / "model.safetensors").read_bytes()


def metrics(save: Path) -> list[dict[str, Any]]:
    path = save / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def submit(cluster: Cluster, save: Path, assets: Path, *, steps: int) -> str:
    given = SETTINGS | SLOW | {"SAVE": str(save), "ASSETS": str(assets), "STEPS": str(steps)}
    return cluster.submit("-N2", f"--output={cluster.directory}/%j.out", "slurm/ppo_ray.sbatch", LAUNCHER, **given)


def test_two_nodes_and_a_requeue_change_nothing(cluster: Cluster, assets: Path) -> None:
    """The weights are those of both stages and the engine on one machine, without Slurm or Ray."""
    save, alone = cluster.directory / "ppo", cluster.directory / "ppo of one machine"
    job = submit(cluster, save, assets, steps=STEPS)
    until(lambda: len(metrics(save)) >= 2 or cluster.state(job) == "FAILED", 240, "the second step")
    cluster.on("ctl", "scancel", "--signal=USR1", "--batch", job)
    assert cluster.wait(job, 240) == "COMPLETED", (cluster.directory / f"{job}.out").read_text()
    assert cluster.field(job, "Restarts") == "1"
    log = (save / "slurm" / "driver.node1.log").read_text()
    places = re.findall(r"^(actor\+reference|rollout) +\d+(?: \(\w+\))? +(\d)", log, re.MULTILINE)
    assert places[:3] == [("actor+reference", "0"), ("actor+reference", "1"), ("rollout", "1")]
    assert "broadcast" in log
    assert log.count("step 1/6 ") == 1, "the second start goes on"
    rows = [row for row in metrics(save) if "rollout/logprob_diff_max" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert max(row["rollout/logprob_diff_max"] for row in rows) < 1e-3

    given = os.environ | SETTINGS | {"SAVE": str(alone), "ASSETS": str(assets), "STEPS": str(STEPS), "NNODES": "1"}
    command = ["bash", LAUNCHER, "--no_ray"]
    subprocess.run(command, cwd=ROOT, env=given | {"PYTHON": sys.executable}, check=True)
    assert weights(save) == weights(alone)
    assert weights(save) != (assets / "model" / "model.safetensors").read_bytes()
    rewards = [[row["reward/mean"] for row in metrics(run) if "reward/mean" in row] for run in (save, alone)]
    assert rewards[0] == rewards[1] and len(set(rewards[0])) > 1
    cluster.check_empty()


def test_scancel_leaves_nothing(cluster: Cluster, assets: Path) -> None:
    save = cluster.directory / "cancelled ppo"
    job = submit(cluster, save, assets, steps=10_000)
    until(lambda: len(metrics(save)) >= 2, 240, "the second step")
    cluster.on("ctl", "scancel", job)
    assert cluster.wait(job, 60) == "CANCELLED"
    cluster.check_empty()
