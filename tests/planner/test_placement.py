"""Placement plans against hand-made ones."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import from_dict
from megarlhf.config.evaluation_arguments import EvaluationArguments
from megarlhf.planner.placement import Machine, PlacementPlan, object_store_bytes, plan_placement
from tests.trainers.plain_roles import make_config


def plan(
    *,
    devices: Any = "cpu",
    nodes: int = 1,
    gpus_per_node: int = 2,
    cores_per_node: int = 4,
    actor_world_size: int = 2,
    critic_world_size: int | None = None,
    **options: Any,
) -> PlacementPlan:
    """Ranks as if all of them were asked for on one node, whatever the machine has."""
    ranks = {"actor_num_gpus_per_node": actor_world_size, "advantage_estimator": "reinforce"}
    if critic_world_size is not None:
        ranks |= {"critic_num_gpus_per_node": critic_world_size, "advantage_estimator": "gae"}
    config = from_dict(PPOConfig, {"pretrain": "m", "prompt_data": "d", "save": "s", **ranks, **options})
    return plan_placement(config, Machine(devices, nodes, gpus_per_node, cores_per_node))


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
    placed = plan(actor_world_size=4, vllm_num_engines=2, nodes=2)
    assert where(placed, "actor") == [(0, (0, 1), 2), (0, (2, 3), 2), (1, (0, 1), 2), (1, (2, 3), 2)]
    assert where(placed, "rollout") == [(0, (0, 1, 2, 3), 4), (1, (0, 1, 2, 3), 4)]


def test_disjoint_roles_on_cpu_split_the_cores() -> None:
    placed = plan(critic_world_size=1, colocate_all_models=False)
    assert where(placed, "actor") == [(0, (0,), 1), (0, (1,), 1)]
    assert where(placed, "critic") == [(0, (2,), 1)]
    assert where(placed, "rollout") == [(0, (3,), 1)]


def test_disjoint_cpu_engines_do_not_span_nodes_even_where_that_costs_cores() -> None:
    # 1 + 4 x 2 = 9 ranks make 3 slots on each of 3 nodes, into which four pairs and a single do not go: 4 slots do.
    placed = plan(
        actor_world_size=1, vllm_num_engines=4, vllm_tensor_parallel_size=2, nodes=3, colocate_all_models=False
    )
    assert [w.node for w in placed.of("rollout")] == [0, 1, 1, 2]
    assert [w.devices for w in placed.of("rollout")] == [(1, 2), (0, 1), (2, 3), (0, 1)]


def test_colocated_gpus() -> None:
    placed = plan(
        actor_world_size=4,
        gpus_per_node=2,
        nodes=2,
        vllm_num_engines=1,
        vllm_tensor_parallel_size=2,
        devices="gpu",
        cores_per_node=8,
    )
    assert where(placed, "actor") == [(0, (0,), 4), (0, (1,), 4), (1, (0,), 4), (1, (1,), 4)]
    assert where(placed, "rollout") == [(0, (0, 1), 8)]
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
