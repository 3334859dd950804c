"""slurm/ppo_ray.sbatch with a run that only waits: Ray over two nodes, its ports, and what is said of mistakes."""

import re
from pathlib import Path

import pytest

from tests.slurm.cluster import ADDRESSES, NODES, Cluster, until

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
SETTINGS = {"RAY_OBJECT_STORE_BYTES": "100000000", "GRACE_SECONDS": "20", "RAY_NUM_CPUS": "2"}


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


def test_two_jobs_on_the_same_nodes_at_once(cluster: Cluster) -> None:
    """Tasks of an array: each has its directory, seed, ports and logs, and the end of one leaves the other alone."""
    save, tasks = cluster.directory / "array", (3, 4)
    before = {node: listening(cluster, node) for node in NODES}
    settings = {"SEED": "40", "SAVE_SECONDS": "3", "MAX_REQUEUES": "0"}
    array = submit(cluster, save, options=("-N2", "--array=3-4"), **settings)
    runs = {task: save / f"task-{task}" for task in tasks}
    for task in tasks:
        until(lambda task=task: (runs[task] / "waiting").exists(), 180, "the second step")  # type: ignore[misc]
    jobs = {task: cluster.field(f"{array}_{task}", "JobId") for task in tasks}
    firsts = [int(re.findall(r"ports (\d+)-", said(cluster, jobs[task]))[0]) for task in tasks]
    blocks = [set(range(first, first + 300)) for first in firsts]
    assert not blocks[0] & blocks[1]
    for node in NODES:
        opened = listening(cluster, node) - before[node]
        assert opened <= blocks[0] | blocks[1] and all(4 < len(opened & block) for block in blocks)
    shown = " ".join(line for node in NODES for line in cluster.processes(node))
    assert not re.search(r"\b[0-9a-f]{64}\b", shown), "the token is in no command line"
    logs = {"driver.node1.log", "ray-head.node1.log", "ray-worker.node2.log", "ready.node1.log"}
    for task in tasks:
        lines = (runs[task] / "slurm" / "driver.node1.log").read_text().splitlines()
        steps = [line for line in lines if line.startswith("step")]
        assert steps == [f"step {step} on node1 node2, seed {40 + task}" for step in (1, 2)]
        assert {path.name for path in (runs[task] / "slurm").iterdir()} == logs

    cluster.on("ctl", "scancel", "--signal=USR1", "--batch", jobs[3])
    assert cluster.wait(jobs[3], 60) == "FAILED"
    ended = said(cluster, jobs[3])
    assert "SAVE_SECONDS=3 are over: the last checkpoint counts" in ended
    assert f"not requeued again, MAX_REQUEUES=0; sbatch it once more with SAVE={runs[3]} to go on" in ended
    assert "heard" in (runs[3] / "slurm" / "driver.node1.log").read_text()
    assert cluster.state(jobs[4]) == "RUNNING"
    for node in NODES:
        until(lambda node=node: listening(cluster, node) - before[node] <= blocks[1], 10, "the end of its ports")  # type: ignore[misc]
        assert 4 < len(listening(cluster, node) & blocks[1])
    assert "heard" not in (runs[4] / "slurm" / "driver.node1.log").read_text()
    cluster.on("ctl", "scancel", jobs[4])
    assert cluster.wait(jobs[4], 60) == "CANCELLED"
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
