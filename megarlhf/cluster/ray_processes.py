"""Worker processes as Ray's actors, on this machine or on the nodes of a cluster."""

import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import NODE_ID_LABEL_KEY, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megarlhf.cluster.node_files import NodeLogs, Places, nodes_without_run_directory
from megarlhf.cluster.nodes import devices_of, machine_of, usable_nodes
from megarlhf.cluster.processes import CallFailedError, ProcessDiedError, ProcessError, Processes, ValueLostError
from megarlhf.config.arguments import PPOConfig
from megarlhf.planner.placement import PlacementPlan, object_store_bytes
from megarlhf.trainers.roles import NodeLostError, RoleFailedError

TOKEN = secrets.token_hex(32)  # of what this process starts; Ray reads it once
_POLL_SECONDS = 1.0
Nodes = Mapping[int, Mapping[str, Any]]  # what Ray says of each node of a plan


@contextmanager
def ray_processes(config: PPOConfig, plan: PlacementPlan) -> Iterator[Processes]:
    """Ray with room for the workers of a plan; they end with the block.

    Raises:
        RuntimeError: the cluster has no such room.
        NodeLostError: a node is lost, and no other is like it.
        RoleFailedError: one is lost meanwhile.
    """
    _start_ray(config, plan)
    try:
        limit = config.cluster.start_timeout_seconds
        nodes, bundles = _reserve(plan, limit)
        places = {
            node: PlacementGroupSchedulingStrategy(placement_group=bundles, placement_group_bundle_index=number)
            for number, node in enumerate(nodes)
        }
        try:
            names = _gpus(plan, places, limit)
            logs = _logs(config, plan, places, limit)
        except ray.exceptions.RayError as error:
            said = f"a node was lost, or did not answer, before it had processes: {error}"
            raise RoleFailedError(said, trains=False) from error
        try:
            yield RayProcesses(places, names, nodes, logs)
        finally:
            logs.close()
    finally:
        ray.shutdown()


def _logs(config: PPOConfig, plan: PlacementPlan, places: Places, timeout_seconds: float) -> NodeLogs:
    blind = []
    if config.cluster.ray_address is not None:
        blind = nodes_without_run_directory(config, plan, places, timeout_seconds=timeout_seconds)
    own = Path(config.logging.save).absolute() / "logs"
    return NodeLogs(own, {node: places[node] for node in blind}, timeout_seconds=timeout_seconds)


class RayStore:
    """Ray's object store; see Store."""

    def put(self, values: Sequence[Any]) -> list[Any]:
        """See Store."""
        return [ray.put(value) for value in values]

    def get(self, references: Sequence[Any]) -> list[Any]:
        """See Store."""
        return list(ray.get(list(references)))


class RayProcesses:
    """Actors in the bundles of a placement group, one for each node; see Processes."""

    def __init__(
        self,
        places: Places,
        device_names: Mapping[tuple[int, int], str],
        nodes: Nodes,
        logs: NodeLogs,
    ) -> None:
        self.store, self._places, self.device_names, self._logs = RayStore(), places, device_names, logs
        self._nodes, several = nodes, len(nodes) > 1
        self.addresses = {node: str(found["NodeManagerAddress"]) for node, found in nodes.items() if several}

    def has_lost(self, node: int) -> bool:
        """See Processes."""
        return self._nodes[node]["NodeID"] not in _alive(ray.nodes())

    def start(self, worker: Any, spec: Any, environment: Mapping[str, str]) -> Any:
        """See Processes."""
        options = ray.remote(worker).options(
            num_cpus=0,  # devices are shared by phases, so the plan assigns them and not Ray
            num_gpus=0,
            runtime_env={"env_vars": dict(environment)},
            scheduling_strategy=self._places[spec.node],
        )
        spec = replace(spec, log_file=self._logs.path(spec.node, spec.log_file))
        return options.remote(spec, self.store)

    def submit(self, handle: Any, method: str, *args: Any) -> Any:
        """See Processes."""
        return getattr(handle, method).remote(*args)

    def wait(self, calls: Sequence[Any], *, all_of_them: bool, timeout_seconds: float) -> tuple[list[Any], list[Any]]:
        """See Processes."""
        ended, others = ray.wait(
            list(calls), num_returns=len(calls) if all_of_them else 1, timeout=max(0.0, timeout_seconds)
        )
        return list(ended), list(others)

    def result(self, call: Any) -> Any:
        """See Processes."""
        try:
            return ray.get(call)
        except ray.exceptions.RayActorError as error:
            raise ProcessDiedError(str(error)) from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ray.exceptions.ObjectLostError):
                raise ValueLostError("values are lost with the process that stored them") from error
            raise CallFailedError(error.cause if isinstance(error.cause, Exception) else error) from error
        except ray.exceptions.RayError as error:
            raise ProcessError(str(error)) from error

    def kill(self, handle: Any) -> None:
        """See Processes."""
        ray.kill(handle)

    def collect_logs(self) -> None:
        """See Processes."""
        self._logs.collect()


def _start_ray(config: PPOConfig, plan: PlacementPlan) -> None:
    """A local Ray that only this run's token opens, or the cluster at --ray_address."""
    if config.cluster.ray_address is None:
        os.environ["RAY_AUTH_TOKEN"] = TOKEN
        ray.init(
            address="local",  # whatever RAY_ADDRESS says
            num_cpus=max(1, len(plan.workers)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=object_store_bytes(config),
            _node_ip_address="127.0.0.1",
        )
    else:
        ray.init(address=config.cluster.ray_address, log_to_driver=False, logging_level=logging.ERROR)


def _alive(found: Sequence[Mapping[str, Any]]) -> set[str]:
    return {node["NodeID"] for node in found if node["Alive"]}


def _nodes(plan: PlacementPlan) -> Nodes:
    """Ray's node for each of the plan: at the address that it was planned with, or for a lost one another like it.

    Raises:
        NodeLostError: there is none.
    """
    found, chosen = usable_nodes(ray.nodes(), kind=plan.device_kind), dict[int, Mapping[str, Any]]()
    left, numbers = list(found), sorted({worker.node for worker in plan.workers})
    there = {node["NodeManagerAddress"] for node in found}
    for node in sorted(numbers, key=lambda number: plan.addresses[number] not in there):  # then those that are lost
        gpus = len({gpu for w in plan.workers if w.node == node for gpu in w.devices}) * (plan.device_kind == "gpu")
        fitting = [other for other in left if other["Resources"].get("GPU", 0) >= gpus]
        if not fitting:
            needed = f"with {gpus} GPU(s) or more" if gpus else "to take its place"
            raise NodeLostError(
                f"node {plan.addresses[node]} is lost, which is node {node} of the plan, and Ray has no other "
                f"{needed}: it has {machine_of(found) if found else 'none'}"
            )
        same = [other for other in fitting if other["NodeManagerAddress"] == plan.addresses[node]]
        chosen[node] = (same or fitting)[0]
        left.remove(chosen[node])
    return dict(sorted(chosen.items()))


def _reserve(plan: PlacementPlan, timeout_seconds: float) -> tuple[Nodes, Any]:
    """One Ray placement bundle on each node, with its workers' share of CPUs and GPUs.

    Ray needs seconds to know that a node is lost; where it was one of these, others are taken.

    Raises:
        RuntimeError: Ray does not give it in time.
        NodeLostError: see _nodes; or the node in the place of a lost one has no room.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        nodes = _nodes(plan)
        bundles = [_bundle(plan, number, found) for number, found in nodes.items()]
        group = placement_group(
            bundles,
            strategy="STRICT_SPREAD" if len(nodes) > 1 else "STRICT_PACK",
            bundle_label_selector=[{NODE_ID_LABEL_KEY: found["NodeID"]} for found in nodes.values()],
        )
        ready = [group.ready()]
        while {found["NodeID"] for found in nodes.values()} <= _alive(ray.nodes()):
            if ray.wait(ready, timeout=_POLL_SECONDS)[0]:
                return nodes, group
            if time.monotonic() > deadline:
                planned = [(plan.addresses[node], found["NodeManagerAddress"]) for node, found in nodes.items()]
                lost = [f"node {address} is lost, and " for address, other in planned if address not in ("", other)]
                raise (NodeLostError if lost else RuntimeError)(
                    f"{''.join(lost)}Ray did not find room for {bundles} within start_timeout_seconds="
                    f"{timeout_seconds:g}: the cluster has {ray.available_resources()} left of "
                    f"{ray.cluster_resources()}; start more nodes, or ask for fewer ranks"
                )
        remove_placement_group(group)


def _bundle(plan: PlacementPlan, node: int, found: Mapping[str, Any]) -> dict[str, float]:
    here = [worker for worker in plan.workers if worker.node == node]
    bundle = {"CPU": min(float(len(here)), found["Resources"].get("CPU", 0.0))}  # ranks may share cores
    if plan.device_kind != "cpu":
        bundle["GPU"] = float(len({device for worker in here for device in worker.devices}))
    return {name: number for name, number in bundle.items() if number}


def _gpus(plan: PlacementPlan, on_nodes: Places, timeout_seconds: float) -> dict[tuple[int, int], str]:
    """Names of the GPUs that Ray gave, by node and the plan's number; none on CPUs."""
    if plan.device_kind == "cpu":
        return {}
    places = sorted({(worker.node, device) for worker in plan.workers for device in worker.devices})
    names: list[str] = []
    for node, on_node in on_nodes.items():
        count = sum(place[0] == node for place in places)
        names += devices_of(on_node, count, timeout_seconds=timeout_seconds)
    return dict(zip(places, names, strict=True))
