"""Which way weights take, for plans of all kinds, and plans that leave none."""

import re
from dataclasses import replace
from typing import Any

import pytest

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import from_dict
from megarlhf.planner.placement import Machine, plan_placement
from megarlhf.planner.transport import Transport, plan_transport

APART = {"colocate_all_models": False}


def config(**options: Any) -> PPOConfig:
    given = {"pretrain": "m", "prompt_data": "d", "save": "s", "advantage_estimator": "reinforce"} | options
    return from_dict(PPOConfig, given)


def decided(devices: Any, *, engine_node: int = 0, **options: Any) -> Transport:
    """For two ranks of the actor on node 0 and an engine."""
    run = config(actor_num_gpus_per_node=2, **options)
    plan = plan_placement(run, Machine.alike(devices, 1, 4, 4))
    moved = [replace(w, node=engine_node) if w.role.name == "rollout" else w for w in plan.workers]
    return plan_transport(run, replace(plan, workers=tuple(moved), notes=()))


ONE, SEVERAL = "the actor's ranks and the engines are on one node", ".* are on several nodes"


@pytest.mark.parametrize(
    ("devices", "options", "name", "why"),
    [
        ("cpu", {}, "shared_memory", ONE),
        ("cpu", APART, "shared_memory", ONE),
        ("cpu", {"engine_node": 1}, "broadcast", SEVERAL),
        ("gpu", {}, "ipc", ONE + ", with the same GPUs"),
        ("gpu", {"vllm_tensor_parallel_size": 4}, "shared_memory", ONE + ", with some GPUs shared"),
        ("gpu", APART, "broadcast", ONE + ", with GPUs of their own"),
        ("gpu", APART | {"engine_node": 1}, "broadcast", SEVERAL + ", with GPUs of their own"),
        ("cpu", {"weight_transport": "broadcast"}, "broadcast", f"as weight_transport says; {ONE}"),
        ("cpu", {"weight_transport": "ipc"}, "ipc", f"as weight_transport says; {ONE}"),
        ("gpu", APART | {"weight_transport": "shared_memory"}, "shared_memory", "as weight_transport says; .*"),
    ],
)
def test_the_plan_decides(devices: Any, options: dict[str, Any], name: str, why: str) -> None:
    found = decided(devices, **options)
    assert (found.name, found.one_host) == (name, options.get("engine_node", 0) == 0)
    assert re.fullmatch(rf"weights to the engines: {name} \({why}\)", found.line())


@pytest.mark.parametrize(
    ("devices", "options", "message"),
    [
        ("cpu", {"weight_transport": "shared_memory", "engine_node": 1}, "=shared_memory, .*: set auto or broadcast$"),
        ("cpu", {"weight_transport": "ipc", "engine_node": 1}, "=ipc, .* on several nodes .*: set auto or broadcast$"),
        ("gpu", {"weight_transport": "broadcast"}, "=broadcast, .* with the same GPUs .*: set auto or ipc or shared"),
        ("gpu", APART | {"weight_transport": "ipc"}, "with GPUs of their own .*: set auto or broadcast or shared"),
    ],
)
def test_plans_that_leave_no_way(devices: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decided(devices, **options)


def test_gpus_of_which_some_are_shared_between_nodes_leave_none() -> None:
    run = config(actor_num_gpus_per_node=2, vllm_num_engines=2)
    plan = plan_placement(run, Machine.alike("gpu", 1, 4, 4))
    moved = [replace(w, node=1) if w.role.name == "rollout" and w.rank == 1 else w for w in plan.workers]
    with pytest.raises(ValueError, match="=auto, .* several nodes, with some GPUs shared .*: set colocate_all"):
        plan_transport(run, replace(plan, workers=tuple(moved)))
