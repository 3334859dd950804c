"""Placement plans against hand-made ones."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import from_dict
from megarlhf.config.evaluation_arguments import EvaluationArguments
from megarlhf.planner.placement import Machine, Node, PlacementPlan, object_store_bytes, plan_placement
from tests.trainers.plain_roles import make_config


def plan(
    *,
    devices: Any = "cpu",
    nodes: int = 1,
    gpus_per_node: int = 2,
    cores_per_node: int = 4,
    actor_world_size: int = 2,
    critic_world_size: int | None = None,
    machine: Machine | None = None,
    **options: Any,
) -> PlacementPlan:
    """Ranks of one node, unless options say more."""
    ranks = {"actor_num_gpus_per_node": actor_world_size, "advantage_estimator": "reinforce"}
    if critic_world_size is not None:
        ranks |= {"critic_num_gpus_per_node": critic_world_size, "advantage_estimator": "gae"}
    config = from_dict(PPOConfig, {"pretrain": "m", "prompt_data": "d", "save": "s", **ranks, **options})
    return plan_placement(config, machine or Machine.alike(devices, nodes, gpus_per_node, cores_per_node))


def where(placed: PlacementPlan, role: Any) -> list[tuple[int, tuple[int, ...], int]]:
    return [(worker.node, worker.devices, worker.threads) for worker in placed.of(role)]


def test_colocated_roles_on_one_cpu_node_each_have_all_cores_in_turn() -> None:
    placed = plan(critic_world_size=1, vllm_num_engines=2)
    assert where(placed, "actor") == [(0, (0, 1), 2), (0, (2, 3), 2)]
    assert where(placed, "critic") == [(0, (0, 1, 2, 3), 4)]
    assert where(placed, "rollout") == [(0, (0, 1), 2), (0, (2, 3), 2)]
    assert placed.notes == ()


@pytest.mark.parametrize("cores", range(1, 9))
@pytest.mark.parametrize(("world", "engines", "tp"), [(1, 1, 1), (2, 1, 2), (3, 2, 1), (4, 2, 2)])
def test_cpu_threads_follow_the_formula(cores: int, world: int, engines: int, tp: int) -> None:
    placed = plan(actor_world_size=world, vllm_num_engines=engines, vllm_tensor_parallel_size=tp, cores_per_node=cores)
    assert {w.threads for w in placed.of("actor")} == {max(1, cores // world)}
    assert {w.threads for w in placed.of("rollout")} == {max(1, cores // engines // tp) * tp}
    assert all(len(w.devices) == w.threads and max(w.devices) < cores for w in placed.workers)


def test_more_cpu_ranks_than_cores_share_them_and_say_so() -> None:
    placed = plan(actor_world_size=3, cores_per_node=2)
    assert where(placed, "actor") == [(0, (0,), 1), (0, (1,), 1), (0, (0,), 1)]
    assert "3 ranks share the 2 core(s)" in placed.notes[0]
    assert placed.notes[0] in placed.table()


def test_cpu_ranks_spread_evenly_over_nodes() -> None:
    placed = plan(actor_num_nodes=2, vllm_num_engines=2, nodes=2)
    assert where(placed, "actor") == [(0, (0, 1), 2), (0, (2, 3), 2), (1, (0, 1), 2), (1, (2, 3), 2)]
    assert where(placed, "rollout") == [(0, (0, 1, 2, 3), 4), (1, (0, 1, 2, 3), 4)]


def test_disjoint_roles_on_cpu_split_the_cores() -> None:
    placed = plan(critic_world_size=1, colocate_all_models=False)
    assert where(placed, "actor") == [(0, (0,), 1), (0, (1,), 1)]
    assert where(placed, "critic") == [(0, (2,), 1)]
    assert where(placed, "rollout") == [(0, (3,), 1)]


def test_disjoint_cpu_engines_do_not_span_nodes_even_where_that_costs_cores() -> None:
    # 1 + 4 x 2 = 9 ranks are 3 for each of 3 nodes, but a pair is not cut: 4 on one of them, and so many parts of all.
    placed = plan(
        actor_world_size=1, vllm_num_engines=4, vllm_tensor_parallel_size=2, nodes=3, colocate_all_models=False
    )
    assert [w.node for w in placed.of("rollout")] == [0, 1, 2, 2]
    assert [w.devices for w in placed.of("rollout")] == [(1, 2), (0, 1), (0, 1), (2, 3)]


def test_colocated_gpus() -> None:
    placed = plan(
        actor_num_nodes=2,
        gpus_per_node=2,
        nodes=2,
        vllm_num_engines=1,
        vllm_tensor_parallel_size=2,
        devices="gpu",
        cores_per_node=8,
    )
    assert where(placed, "actor") == [(0, (0,), 4), (0, (1,), 4), (1, (0,), 4), (1, (1,), 4)]
    assert where(placed, "rollout") == [(1, (0, 1), 8)]
    assert placed.notes == ("rollout: 2 of 4 GPUs in use, the others are idle",)


def test_disjoint_gpus_are_used_once() -> None:
    placed = plan(
        actor_world_size=3,
        critic_world_size=1,
        vllm_num_engines=2,
        vllm_tensor_parallel_size=2,
        gpus_per_node=4,
        nodes=2,
        colocate_all_models=False,
        devices="gpu",
    )
    taken = [(worker.node, device) for worker in placed.workers for device in worker.devices]
    assert taken == [(node, device) for node in (0, 1) for device in range(4)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"actor_world_size": 3}, "actor_num_nodes x actor_num_gpus_per_node=3"),
        ({"critic_world_size": 3}, "critic_num_nodes x critic_num_gpus_per_node=3"),
        ({"vllm_num_engines": 3}, "vllm_num_engines=3 x vllm_tensor_parallel_size=1"),
        ({"vllm_tensor_parallel_size": 3, "nodes": 2}, "vllm_num_engines=1 x vllm_tensor_parallel_size=3"),
        ({"colocate_all_models": False}, "colocate_all_models=False"),
    ],
)
def test_too_few_gpus(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan(devices="gpu", **changes)


CPU = {"critic_world_size": 1, "critic_num_nodes": 1}
GPU = CPU | {"devices": "gpu"}


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        # Differing numbers of GPUs: the critic's four on one node leave the actor's two nodes where two are.
        (
            [(4, 8), (2, 8), (2, 8)],
            GPU | {"actor_num_nodes": 2, "critic_world_size": 4, "vllm_num_engines": 1, "colocate_all_models": False},
            "no room for the engine",
        ),
        (
            [(8, 8), (4, 8), (2, 8)],
            GPU | {"actor_num_nodes": 2, "critic_world_size": 4, "vllm_num_engines": 4, "colocate_all_models": False},
            {
                "actor": [(1, "0"), (1, "1"), (2, "0"), (2, "1")],
                "critic": [(0, "0"), (0, "1"), (0, "2"), (0, "3")],
                "rollout": [(0, "4"), (0, "5"), (0, "6"), (1, "2")],
            },
        ),
        # Taking turns: all start at the first node, and engines stay where models are, if all fit there.
        (
            [(8, 8), (4, 8), (4, 8)],
            GPU | {"actor_num_nodes": 2, "actor_world_size": 4, "critic_world_size": 8, "vllm_num_engines": 3},
            {
                "actor": [(0, "0"), (0, "1"), (0, "2"), (0, "3"), (1, "0"), (1, "1"), (1, "2"), (1, "3")],
                "critic": [(0, str(gpu)) for gpu in range(8)],
                "rollout": [(0, "0"), (0, "1"), (0, "2")],
            },
        ),
        (
            [(4, 8), (4, 8)],
            GPU | {"actor_num_nodes": 2, "actor_world_size": 1, "vllm_num_engines": 1, "vllm_tensor_parallel_size": 2},
            {"actor": [(0, "0"), (1, "0")], "critic": [(0, "0")], "rollout": [(1, "0-1")]},
        ),
        (
            [(4, 8), (4, 8)],
            GPU | {"actor_num_nodes": 1, "actor_world_size": 1, "vllm_num_engines": 1},
            {"actor": [(0, "0")], "critic": [(0, "0")], "rollout": [(0, "0")]},
        ),
        # Cores: equal parts of each node's own.
        (
            [(0, 8), (0, 4)],
            CPU | {"actor_num_nodes": 2, "critic_num_nodes": 2},
            {
                "actor": [(0, "0-3"), (0, "4-7"), (1, "0-1"), (1, "2-3")],
                "critic": [(0, "0-7"), (1, "0-3")],
                "rollout": [(1, "0-3")],
            },
        ),
        (
            [(0, 6), (0, 3), (0, 3)],
            CPU | {"actor_num_nodes": 2, "vllm_num_engines": 2, "colocate_all_models": False},
            {
                "actor": [(0, "0-1"), (0, "2-3"), (1, "0"), (1, "1")],
                "critic": [(2, "0")],
                "rollout": [(2, "1"), (2, "2")],
            },
        ),
    ],
)
def test_differing_nodes(nodes: list[tuple[int, int]], options: dict[str, Any], expected: Any) -> None:
    machine = Machine(options.get("devices", "cpu"), tuple(Node(*node, f"10.0.0.{n}") for n, node in enumerate(nodes)))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=r"fit on 3 node\(s\) \(10.0.0.0: 4 GPU\(s\), 10.0.0.1: 2 GPU\(s\),"):
            plan(machine=machine, **options)
        return
    placed = plan(machine=machine, **options)
    found = {role: [(w.node, as_text(w.devices)) for w in placed.of(role)] for role in expected}
    assert found == expected


def as_text(devices: tuple[int, ...]) -> str:
    assert list(devices) == list(range(devices[0], devices[-1] + 1))
    return f"{devices[0]}-{devices[-1]}" if len(devices) > 1 else str(devices[0])


def test_missing_nodes_are_counted() -> None:
    with pytest.raises(ValueError, match=r"actor_num_nodes=5: 3 node\(s\) are missing\): use fewer"):
        plan(actor_num_nodes=5, nodes=2)
    with pytest.raises(ValueError, match=r"critic_num_nodes=3: 1 node\(s\) are missing"):
        plan(devices="gpu", actor_num_nodes=2, critic_num_nodes=3, critic_world_size=1, nodes=2)


def test_coordinates_are_those_of_megatron() -> None:
    placed = plan(actor_world_size=8, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert [w.place for w in placed.of("actor")] == [
        "tp0 dp0 pp0",
        "tp1 dp0 pp0",
        "tp0 dp1 pp0",
        "tp1 dp1 pp0",
        "tp0 dp0 pp1",
        "tp1 dp0 pp1",
        "tp0 dp1 pp1",
        "tp1 dp1 pp1",
    ]


def test_coordinates_of_every_dimension() -> None:
    """Megatron's order tp-cp-dp-pp: the first changes fastest."""
    placed = plan(
        actor_world_size=24, tensor_model_parallel_size=2, context_parallel_size=3, pipeline_model_parallel_size=2
    )
    places = [w.place for w in placed.of("actor")]
    for rank, place in enumerate(places):
        assert place == f"tp{rank % 2} cp{rank // 2 % 3} dp{rank // 6 % 2} pp{rank // 12}", rank


def test_table() -> None:
    table = plan(pipeline_model_parallel_size=2).table()
    assert table == (
        "role             rank     node  cores  threads  phases\n"
        "actor+reference  0 (pp0)  0     0-1    2        train\n"
        "actor+reference  1 (pp1)  0     2-3    2        train\n"
        "rollout          0        0     0-3    4        rollout"
    )
    assert re.search(r"^role +rank +node +GPUs", plan(devices="gpu").table())


def test_the_store_holds_a_step_of_the_longest_responses() -> None:
    config = make_config(Path("unused"), batch={"rollout_batch_size": 2048, "n_samples_per_prompt": 16})
    assert object_store_bytes(config) == 128 << 20  # 8 tokens a response
    rollout = replace(config.rollout, generate_max_len=8192, prompt_max_len=1000)
    expected = 1.25 * (24 * 2048 * 16 * 8192 + 4 * 2048 * 1000)
    config = replace(config, rollout=rollout)
    assert object_store_bytes(config) == int(expected) > 8e9
    evaluation = EvaluationArguments(eval_data="e", eval_n_samples_per_prompt=4999)
    assert object_store_bytes(replace(config, evaluation=evaluation)) == int(expected), "in parts of 6 prompts"
    config = replace(config, batch=replace(config.batch, rollout_batch_size=4), evaluation=evaluation)
    assert object_store_bytes(config) == int(1.25 * (24 * 5000 * 8192 + 4 * 4 * 1000)), "more than a step's 64"
