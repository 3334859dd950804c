"""A node of Ray's that is lost in the middle of a run: another one takes its place, or the run ends and names it."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megarlhf.formats import run_checkpoints
from tests.cluster.ray_nodes import head, join
from tests.cluster.runs import SMALL, Run, metrics, start, write_inputs

pytestmark = pytest.mark.slow


class Nodes(NamedTuple):
    """The driver's at 127.0.0.2, and others, by address."""

    address: str
    others: dict[str, subprocess.Popen[bytes]]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Three of them."""
    with head("127.0.0.2") as cluster:
        others = {address: join(cluster, address) for address in ("127.0.0.3", "127.0.0.4")}
        yield Nodes(cluster.address, others)
        for node in others.values():
            node.kill()
            node.wait(timeout=60)


def after_losing(node: subprocess.Popen[bytes], flags: dict[str, str | None], *, after_step: int) -> Run:
    """A run that has ended; meanwhile all processes of a node did, while the step after this one was made."""
    process, log = start("train_ppo_ray", flags), Path(str(flags["--save"])) / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not log.is_file() or max(metrics(log.parent), default=0) < after_step:
        assert process.poll() is None and time.monotonic() < deadline, process.read()
        time.sleep(0.05)
    node.kill()
    process.wait(timeout=600)
    return process


def test_another_node_takes_a_lost_ones_place_and_without_one_a_run_ends(
    assets: Path, tmp_path: Path, nodes: Nodes
) -> None:
    """The second of the three is spare at first; then it has a stage of the actor and the engine, and is lost too."""
    flags: dict[str, str | None] = SMALL | write_inputs(tmp_path) | {"--pretrain": str(assets / "model")}
    flags |= {"--advantage_estimator": "rloo", "--train-iters": "4", "--no-colocate-all-models": None}
    flags |= {"--save-interval": "1", "--max_restarts": "2", "--ray_address": nodes.address}
    lost, whole = tmp_path / "lost", tmp_path / "whole"

    process = after_losing(nodes.others["127.0.0.4"], flags | {"--save": str(lost)}, after_step=2)
    output = process.read()
    assert process.returncode == 0, output
    assert "rollout rank 0 on node 127.0.0.4 died during " in output
    assert output.count("starting again after step 2; max_restarts leaves 1 more") == 1, output
    undisturbed = start("train_ppo_ray", flags | {"--save": str(whole)})
    assert undisturbed.wait(timeout=600) == 0, undisturbed.read()
    first, second = ((save / "hf" / "model.safetensors").read_bytes() for save in (whole, lost))
    assert first == second

    two: dict[str, str | None] = {"--pipeline_model_parallel_size": "2", "--actor_num_nodes": "2"}
    save = tmp_path / "ended"
    process = after_losing(nodes.others["127.0.0.3"], flags | two | {"--save": str(save)}, after_step=2)
    output = process.read()
    assert process.returncode == 1, output
    step, *_ = run_checkpoints.latest(save / "checkpoints")
    sentence = "stopped: NodeLostError: node 127.0.0.3 is lost, which is node 1 of the plan, and Ray has no other "
    sentence += "to take its place: it has 1 node(s) (127.0.0.2: 2 core(s))\n"
    assert f"{sentence}continue with load={save}, whose last checkpoint is of step {step}\n" in output, output
