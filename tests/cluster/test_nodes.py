"""Kinds, counts and cores from Ray's nodes; GPUs by the names that the job was given; workers that see others stop."""

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megarlhf.cluster import launch, ray_processes
from megarlhf.cluster.local_processes import LocalProcesses
from megarlhf.cluster.nodes import devices_of, machine_of, usable_nodes
from megarlhf.cluster.workers import WorkerSpec
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import from_dict
from megarlhf.parallel import device
from megarlhf.parallel.device import check_device, visible_devices_environment
from megarlhf.planner.placement import Machine, Node, PlacementPlan, plan_placement
from megarlhf.trainers.roles import NodeLostError

CONFIG = from_dict(
    PPOConfig,
    {
        **{"pretrain": "m", "prompt_data": "d", "save": "s"},
        **{"actor_num_gpus_per_node": 2, "vllm_tensor_parallel_size": 2},
    },
)


def node(address: int = 9, *, cpus: float, gpus: float = 0.0, alive: bool = True) -> dict[str, Any]:
    resources = {"memory": 1e9} | ({"CPU": cpus} if cpus else {}) | ({"GPU": gpus} if gpus else {})
    named = {"NodeManagerAddress": f"10.0.0.{address}", "NodeID": f"{address}"}
    return {"Alive": alive, "Resources": resources, **named}


@pytest.mark.parametrize(
    ("found", "kind", "expected"),
    [
        ([node(cpus=8)], "cpu", [(0, 8, "10.0.0.9")]),
        ([node(cpus=2), node(cpus=96, gpus=8)], "gpu", [(8, 96, "10.0.0.9")]),  # the head has no GPUs
        (
            [node(cpus=48, gpus=4), node(10, cpus=96, gpus=8), node(9, cpus=96, gpus=8), node(1, cpus=64, gpus=8)],
            "gpu",
            [(8, 96, "10.0.0.9"), (8, 96, "10.0.0.10"), (8, 64, "10.0.0.1"), (4, 48, "10.0.0.9")],
        ),
        ([node(cpus=4), node(cpus=96, gpus=8, alive=False), node(8, cpus=0)], "cpu", [(0, 4, "10.0.0.9")]),
    ],
)
def test_what_a_plan_can_count_on(found: list[dict[str, Any]], kind: Any, expected: list[tuple[int, int, str]]) -> None:
    for order in itertools.permutations(found):
        assert machine_of(usable_nodes(order)) == Machine(kind, tuple(Node(*each) for each in expected))


def test_a_cluster_of_nothing() -> None:
    with pytest.raises(ValueError, match="the Ray cluster has no node with GPUs or CPUs"):
        machine_of(usable_nodes([node(cpus=0), node(cpus=4, alive=False)]))


def test_a_plan_gets_the_nodes_it_was_made_for_and_others_for_lost_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, spare = node(3, cpus=8, gpus=4), node(4, cpus=8, gpus=2), node(5, cpus=4, gpus=2)
    machine = machine_of(usable_nodes([spare, second, first]))
    plan = plan_placement(replace(CONFIG, cluster=replace(CONFIG.cluster, actor_num_nodes=2)), machine)
    for found, expected in (
        ([spare, second, first], ["10.0.0.3", "10.0.0.4"]),
        ([node(9, cpus=8, gpus=8), first, second], ["10.0.0.3", "10.0.0.4"]),  # a larger one has joined
        ([spare, first], ["10.0.0.3", "10.0.0.5"]),
        ([spare, second], ["10.0.0.5", "10.0.0.4"]),
    ):
        monkeypatch.setattr(ray, "nodes", lambda found=found: found)
        chosen = ray_processes._nodes(plan)
        assert [chosen[number]["NodeManagerAddress"] for number in (0, 1)] == expected
    cases = [([first], "10.0.0.4 is lost, which is node 1", "it has 1 node\\(s\\) .*0.3: 4")]
    cases += [([second], "10.0.0.3 is .*node 0", "it has 1 node\\(s\\) .*0.4: 2")]
    cases += [([], "node 10.0.0.3 .*node 0", "it has none$")]
    for found, lost, left in cases:
        monkeypatch.setattr(ray, "nodes", lambda found=found: found)
        said = rf"{lost} of the plan, .* no other with 2 GPU\(s\) or more: {left}"
        with pytest.raises(NodeLostError, match=said):
            ray_processes._nodes(plan)


@pytest.mark.parametrize(
    ("present", "kind", "said"),
    [
        ((3, 4), RuntimeError, "^Ray did not find room for .* within start_timeout_seconds=0.1: "),
        ((3, 5), NodeLostError, "^node 10.0.0.4 is lost, and Ray did not find room for "),
    ],
)
def test_nodes_without_room(
    monkeypatch: pytest.MonkeyPatch, present: tuple[int, ...], kind: type[Exception], said: str
) -> None:
    """The one that is to stand for a lost one too."""
    plan = plan_placement(
        replace(CONFIG, cluster=replace(CONFIG.cluster, actor_num_nodes=2)),
        machine_of([node(3, cpus=8, gpus=4), node(4, cpus=8, gpus=2)]),
    )
    monkeypatch.setattr(ray, "nodes", lambda: [node(number, cpus=8, gpus=4) for number in present])
    monkeypatch.setattr(ray_processes, "placement_group", lambda *_, **options: SimpleNamespace(ready=lambda: "call"))
    monkeypatch.setattr(ray, "wait", lambda calls, timeout: ([], calls))
    for name in ("available_resources", "cluster_resources"):
        monkeypatch.setattr(ray, name, dict)
    with pytest.raises(RuntimeError, match=said) as error:
        ray_processes._reserve(plan, 0.1)
    assert type(error.value) is kind


def test_a_plan_of_cores_keeps_its_nodes_where_one_with_gpus_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node(3, cpus=8), node(4, cpus=8)]
    plan = plan_placement(replace(CONFIG, cluster=replace(CONFIG.cluster, actor_num_nodes=2)), machine_of(nodes))
    monkeypatch.setattr(ray, "nodes", lambda: [node(9, cpus=64, gpus=8), *nodes])
    assert [found["NodeManagerAddress"] for found in ray_processes._nodes(plan).values()] == ["10.0.0.3", "10.0.0.4"]


def test_a_worker_that_sees_other_devices_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7")
    check_device("cpu", 4, kind="cpu", num_gpus=0)
    check_device("gpu", 2, kind="gpu", num_gpus=2)
    with pytest.raises(RuntimeError, match=r"gives this worker 1 GPU\(s\) and PyTorch sees 0 .*VISIBLE_DEVICES GPU-7"):
        check_device("gpu", 1, kind="cpu", num_gpus=0)
    with pytest.raises(RuntimeError, match=r"2 GPU\(s\) and PyTorch sees 8"):
        check_device("gpu", 2, kind="gpu", num_gpus=8)
    with pytest.raises(RuntimeError, match="CPU cores and PyTorch sees 1"):
        check_device("cpu", 2, kind="gpu", num_gpus=1)


@pytest.fixture
def given_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A node that was started with three of its machine's GPUs, by UUID."""
    names = ["GPU-c", "GPU-a", "GPU-b"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(names))
    monkeypatch.setenv("RAY_AUTH_TOKEN", ray_processes.TOKEN)
    ray.init(
        address="local",
        **{"num_cpus": 6, "num_gpus": 3, "include_dashboard": False, "log_to_driver": False},
        **{"object_store_memory": 80 << 20, "_node_ip_address": "127.0.0.1"},
    )
    yield names
    ray.shutdown()


def two_roles() -> PlacementPlan:
    """Actor and critic of two ranks each share two of the GPUs, an engine of two takes both."""
    return plan_placement(CONFIG, Machine.alike("gpu", 1, 3, 4))


@pytest.mark.parametrize(
    ("given", "expected"), [(None, "0 1 2"), ("GPU-c,GPU-a,GPU-b", "GPU-c GPU-a GPU-b"), ("7,5,3,2", "7 5 3")]
)
def test_children_get_the_gpus_that_the_run_sees(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    monkeypatch.setattr(device, "num_local_gpus", lambda: 3)
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    started: list[tuple[str, str]] = []

    def start(worker: Any, spec: WorkerSpec, environment: Mapping[str, str]) -> None:
        started.append((spec.name, environment["CUDA_VISIBLE_DEVICES"]))

    children = LocalProcesses()
    monkeypatch.setattr(children, "start", start)
    plan = two_roles()
    for worker in plan.workers:
        launch._launch(children, launch._spec(CONFIG, plan, worker, ()))
    first, second, _ = expected.split()
    pairs = [("actor-0", first), ("actor-1", second), ("critic-0", first), ("critic-1", second)]
    assert started == [*pairs, ("rollout-0", f"{first},{second}")]


def test_workers_get_the_jobs_own_gpus_by_name(given_gpus: list[str]) -> None:
    plan = two_roles()
    _, bundles = ray_processes._reserve(plan, 30.0)
    place = PlacementGroupSchedulingStrategy(placement_group=bundles, placement_group_bundle_index=0)
    gpus = ray_processes._gpus(plan, {0: place}, 30.0)
    assert set(gpus) == {(0, 0), (0, 1)} and len(set(gpus.values())) == 2
    assert set(gpus.values()) < set(given_gpus)
    assert devices_of(place, 2, timeout_seconds=30.0) == [gpus[0, 0], gpus[0, 1]]

    @ray.remote
    def seen() -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    environment = visible_devices_environment([gpus[0, 1]])
    worker = seen.options(num_cpus=0, num_gpus=0, runtime_env={"env_vars": environment})
    assert ray.get(worker.remote(), timeout=60) == gpus[0, 1]
