"""Runs over two nodes that Ray has on this machine: each has an address of its own, and one a directory less."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cluster.ray_nodes import head, join
from tests.cluster.runs import SMALL, metrics, run, write_inputs

pytestmark = pytest.mark.slow


class Nodes(NamedTuple):
    """Two nodes at 127.0.0.2, where the driver is, and 127.0.0.3."""

    address: str
    hidden: Path  # a directory that the second does not see


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Ended with the module."""
    hidden = tmp_path_factory.mktemp("hidden")
    with head("127.0.0.2") as cluster:
        second = join(cluster, "127.0.0.3", hidden=hidden)
        try:
            yield Nodes(cluster.address, hidden)
        finally:
            second.kill()
            second.wait(timeout=60)


def flags_of(assets: Path, save: Path, inputs: Path, **more: str) -> dict[str, str | None]:
    """Actor, critic and engine on devices of their own: one core for each process, wherever it is."""
    flags = SMALL | write_inputs(inputs) | {"--pretrain": str(assets / "model"), "--save": str(save)}
    flags |= {"--train-iters": "2", "--no-colocate-all-models": None}
    return flags | {f"--{name}": value for name, value in more.items()}


def test_a_run_over_two_nodes_is_that_of_one(assets: Path, tmp_path: Path, nodes: Nodes) -> None:
    """A pipeline of two stages on two nodes, the critic on the first, the engine on the second: bit for bit."""
    layout = {"pipeline_model_parallel_size": "2", "critic_pipeline_model_parallel_size": "1"}
    layout |= {"critic_num_nodes": "1", "critic_num_gpus_per_node": "1"}
    one = flags_of(assets, tmp_path / "one", tmp_path, **layout, actor_num_gpus_per_node="2")
    run("train_ppo", one)
    two = flags_of(assets, tmp_path / "two", tmp_path, **layout, actor_num_nodes="2", ray_address=nodes.address)
    said = run("train_ppo_ray", two)
    assert "weights to the engines: broadcast (the actor's ranks and the engines are on several nodes)" in said
    table = [line.split()[:4] for line in said.splitlines() if line.startswith(("actor+", "critic ", "rollout "))]
    assert ["actor+reference", "0", "(pp0)", "0"] in table and ["actor+reference", "1", "(pp1)", "1"] in table
    assert ["critic", "0", "0", "1"] in table and ["rollout", "0", "1", "1"] in table  # role, rank, node, core
    weights = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    first, second = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for step in (1, 2):
        assert second[step]["rollout/logprob_diff_max"] <= 1e-4
        for key in ("reward/mean", "policy/loss", "policy/grad_norm", "critic/loss", "kl/mean"):
            assert second[step][key] == first[step][key], (step, key)
    logs = sorted(path.name for path in (tmp_path / "two" / "logs").iterdir())
    assert logs == ["actor-0.log", "actor-1.log", "critic-0.log", "rollout-0.log"]


def test_logs_of_a_node_without_the_run_directory_are_brought_to_it(assets: Path, tmp_path: Path, nodes: Nodes) -> None:
    save = nodes.hidden / "engine"
    flags = flags_of(assets, save, tmp_path, advantage_estimator="rloo", ray_address=nodes.address)
    run("train_ppo_ray", flags)
    rows = metrics(save)
    assert rows[2]["rollout/logprob_diff_max"] <= 1e-4 and rows[2]["sync/version"] == 2
    assert sorted(path.name for path in (save / "logs").iterdir()) == ["actor-0.log", "rollout-0.log"]
    said = (save / "logs" / "rollout-0.log").read_text()
    assert any(line.endswith(" start") for line in said.splitlines()) and "Loading safetensors" in said


def test_what_a_node_does_not_see_is_said_before_a_process_starts(assets: Path, tmp_path: Path, nodes: Nodes) -> None:
    save = nodes.hidden / "refused"
    flags = flags_of(assets, save, tmp_path, advantage_estimator="rloo", ray_address=nodes.address)
    flags |= {"--actor_num_nodes": "2", "--tokenizer": str(nodes.hidden / "tokenizer")}
    (nodes.hidden / "tokenizer").symlink_to(assets / "model")
    said = run("train_ppo_ray", flags, expect=1)
    for path in (save, nodes.hidden / "tokenizer"):
        assert f"node 127.0.0.3, of actor, rollout, does not see {path}\n" in said
    assert "node 127.0.0.2" not in said and not (save / "logs").exists()


def test_nodes_that_the_cluster_has_not(assets: Path, tmp_path: Path, nodes: Nodes) -> None:
    flags = flags_of(assets, tmp_path / "run", tmp_path, advantage_estimator="rloo", ray_address=nodes.address)
    said = run("train_ppo_ray", flags | {"--actor_num_nodes": "4"}, expect=2)
    assert "do not fit on 2 node(s) (127.0.0.2: 2 core(s), 127.0.0.3: 2 core(s))" in said
    assert "actor_num_nodes=4: 2 node(s) are missing" in said and not (tmp_path / "run").exists()
