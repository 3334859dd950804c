"""slurm/ppo_ray.sbatch with a run that only waits: Ray over two nodes, its ports, and what is said of mistakes."""

import re
from pathlib import Path

import pytest

from tests.slurm.cluster import ADDRESSES, NODES, Cluster, until

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
SETTINGS = {"RAY_OBJECT_STORE_BYTES": "100000000", "GRACE_SECONDS": "8", "RAY_NUM_CPUS": "2"}


def submit(cluster: Cluster, save: Path, options: tuple[str, ...] = ("-N2",), **settings: str) -> str:
    given = SETTINGS | {"SAVE": str(save)} | settings
    out = f"--output={cluster.directory}/%j.out"
    return cluster.submit(*options, out, "slurm/ppo_ray.sbatch", "tests/slurm/stepper.sh", **given)


def said(cluster: Cluster, job: str) -> str:
    return (cluster.directory / f"{job}.out").read_text()


def listening(cluster: Cluster, node: str) -> set[int]:
    """Ports that other nodes can reach, but for srun's."""
    lines = cluster.on(node, "ss", "-Hltn").splitlines()
    places = [line.split()[3].rsplit(":", 1) for line in lines]
    return {int(port) for host, port in places if not host.startswith("127.")} - set(range(60001, 61000))


def test_a_task_of_an_array_that_does_not_end_in_time(cluster: Cluster) -> None:
    """Its directory, seed, ports and logs; and its end, since it may not be requeued."""
    save = cluster.directory / "array"
    before = {node: listening(cluster, node) for node in NODES}
    settings = {"SEED": "40", "SAVE_SECONDS": "3", "MAX_REQUEUES": "0"}
    array = submit(cluster, save, options=("-N2", "--array=3"), **settings)
    run = save / "task-3"
    until(lambda: (run / "waiting").exists(), 120, "the second step")
    job = cluster.field(f"{array}_3", "JobId")
    first = int(re.findall(r"ports (\d+)-", said(cluster, job))[0])
    for node in NODES:
        opened = listening(cluster, node) - before[node]
        assert 4 < len(opened) and opened <= set(range(first, first + 300))
    shown = " ".join(line for node in NODES for line in cluster.processes(node))
    assert not re.search(r"\b[0-9a-f]{64}\b", shown), "the token is in no command line"
    lines = (run / "slurm" / "driver.node1.log").read_text().splitlines()
    steps = [line for line in lines if line.startswith("step")]
    assert steps == [f"step {step} on node1 node2, seed 43" for step in (1, 2)]
    logs = {"driver.node1.log", "ray-head.node1.log", "ray-worker.node2.log", "ready.node1.log"}
    assert {path.name for path in (run / "slurm").iterdir()} == logs

    cluster.on("ctl", "scancel", "--signal=USR1", "--batch", job)
    assert cluster.wait(job, 60) == "FAILED"
    assert "SAVE_SECONDS=3 are over: the last checkpoint counts" in said(cluster, job)
    assert f"not requeued again, MAX_REQUEUES=0; sbatch it once more with SAVE={run} to go on" in said(cluster, job)
    assert "heard" in (run / "slurm" / "driver.node1.log").read_text()
    cluster.check_empty()


def test_a_node_without_ray_is_named(cluster: Cluster) -> None:
    """Its port is taken."""
    run = cluster.directory / "lacking"
    blocks = (32767 - 20000 + 1) // 300
    taking = f"s = [socket.create_server(('', 20001 + 300 * i)) for i in range({blocks})]"
    said_id = "print(os.getpid(), flush=True)"
    taken = cluster.start("node2", "python3", "-c", f"import os, socket, time; {taking}; {said_id}; time.sleep(99)")
    assert taken.stdout is not None
    listener = taken.stdout.readline().strip()
    job = submit(cluster, run, PORT_FIRST="20000", START_SECONDS="25")
    assert cluster.wait(job, 120) == "FAILED"
    cluster.on("node2", "kill", listener)
    taken.communicate()
    assert f"no Ray on node node2 ({ADDRESSES['node2']}) after 25 s" in said(cluster, job)
    assert "node1" not in said(cluster, job).partition("] error:")[2]
    cluster.check_empty()
