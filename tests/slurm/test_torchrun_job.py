"""slurm/supervised_torchrun.sbatch: DPO over two nodes is that of two ranks on one machine, whatever interrupts it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import NODES, Cluster, until

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
ROOT = Path(__file__).parents[2]
LAUNCHER = "examples/dpo_llama3_8b_h100.sh"
STEPS = 40
FLAGS = (
    *("--no-bf16", "--no-apply_chat_template", "--no-use_tensorboard", "--max_len", "32", "--learning_rate", "1e-3"),
    *("--global-batch-size", "6", "--train-iters", str(STEPS)),
)


@pytest.fixture(scope="module")
def settings(cluster: Cluster, assets: Path) -> dict[str, str]:
    """Model, data and layout, as the launcher takes them."""
    data = cluster.directory / "pairs.jsonl"
    rows = [{"prompt": f"sort {i} 1=", "chosen": f"1{i}", "rejected": f"{i}1"} for i in range(2, 10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {"MODEL": str(assets / "model"), "DATASET": str(data), "OMP_NUM_THREADS": "1"}
    return places | {"TP_SIZE": "1", "GPUS_PER_NODE": "2", "GRACE_SECONDS": "20", "SAVE_SECONDS": "200"}


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, str], cluster: Cluster) -> bytes:
    """Weights of two ranks of this machine."""
    save = cluster.directory / "one machine"
    command = ["bash", LAUNCHER, *FLAGS]
    subprocess.run(command, cwd=ROOT, env=os.environ | settings | {"SAVE": str(save)}, check=True)
    return weights(save)


def weights(save: Path) -> bytes:
    return (save / "hf" / "model.safetensors").read_bytes()


def submit(cluster: Cluster, settings: dict[str, str], save: Path) -> str:
    words = ("-N2", f"--output={cluster.directory}/%j.out", "slurm/supervised_torchrun.sbatch", LAUNCHER, *FLAGS)
    return cluster.submit(*words, **settings, SAVE=str(save))


def reached(save: Path) -> int:
    """Last step in the metrics."""
    metrics = save / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def test_two_nodes_and_a_requeue_change_nothing(
    cluster: Cluster, settings: dict[str, str], undisturbed: bytes
) -> None:
    """USR1 comes in the middle."""
    save = cluster.directory / "requeued dpo"
    job = submit(cluster, settings, save)
    until(lambda: reached(save) >= 3, 180, "the third step")
    cluster.on("ctl", "scancel", "--signal=USR1", "--batch", job)
    assert cluster.wait(job, 180) == "COMPLETED", (cluster.directory / f"{job}.out").read_text()
    assert cluster.field(job, "Restarts") == "1"
    for rank, node in enumerate(NODES):
        log = (save / "slurm" / f"torchrun.{node}.log").read_text()
        assert "finishing the step, then saving and leaving" in log and f"rank {1 - rank}" not in log
    log = (save / "slurm" / "torchrun.node1.log").read_text()
    assert log.count(f"step 1/{STEPS} ") == log.count(f"step {STEPS}/{STEPS} ") == 1, "the second start goes on"
    assert weights(save) == undisturbed
    cluster.check_empty()


def test_scancel_leaves_nothing(cluster: Cluster, settings: dict[str, str]) -> None:
    save = cluster.directory / "cancelled dpo"
    job = submit(cluster, settings, save)
    until(lambda: reached(save) >= 1, 180, "the first step")
    cluster.on("ctl", "scancel", job)
    assert cluster.wait(job, 60) == "CANCELLED"
    cluster.check_empty()
