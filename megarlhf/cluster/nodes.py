"""What the nodes of a Ray cluster have, and which devices of them are this run's."""

import logging
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megarlhf.parallel.device import DeviceKind
from megarlhf.planner.placement import Machine, Node


def joined_machine(address: str) -> Machine:
    """The nodes of a running cluster."""
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        return machine_of(usable_nodes(ray.nodes()))
    finally:
        ray.shutdown()


def usable_nodes(
    found: Sequence[Mapping[str, Any]], *, kind: DeviceKind | None = None
) -> list[Mapping[str, Any]]:
    """Of Ray's nodes those that a plan counts on, always in the same order: most GPUs, then cores, then by address.

    Args:
        kind: what they are to have; None: where one has GPUs, those without do not count. Those that Ray has no cores
            of never do.
    """
    alive = [node for node in found if node["Alive"]]
    by_gpus = [node for node in alive if node["Resources"].get("GPU", 0) >= 1]
    by_cores = [node for node in alive if node["Resources"].get("CPU", 0) >= 1]

    def order(node: Mapping[str, Any]) -> tuple[Any, ...]:
        gpus, cores = (node["Resources"].get(name, 0) for name in ("GPU", "CPU"))
        return -gpus, -cores, ip_address(node["NodeManagerAddress"]).packed, node["NodeID"]

    return sorted(by_cores if kind == "cpu" else by_gpus if kind == "gpu" else by_gpus or by_cores, key=order)


def machine_of(usable: Sequence[Mapping[str, Any]]) -> Machine:
    """What a plan needs to know of them.

    Raises:
        ValueError: there is none.
    """
    if not usable:
        raise ValueError("the Ray cluster has no node with GPUs or CPUs: start one with --num-gpus or --num-cpus")
    nodes = tuple(
        Node(
            gpus=int(node["Resources"].get("GPU", 0)),
            cores=max(1, int(node["Resources"].get("CPU", 0))),
            address=node["NodeManagerAddress"],
        )
        for node in usable
    )
    return Machine("gpu" if nodes[0].gpus else "cpu", nodes)


def devices_of(place: PlacementGroupSchedulingStrategy, num_gpus: int, *, timeout_seconds: float) -> list[str]:
    """Names of the GPUs that Ray holds in a node's bundle, as CUDA_VISIBLE_DEVICES has them: numbers or UUIDs.

    Ray takes them from what the node was started with, so they are this job's, whichever other jobs share the node.
    """

    @ray.remote(num_cpus=0, num_gpus=num_gpus)
    def held() -> list[str]:
        return [str(device) for device in ray.get_runtime_context().get_accelerator_ids()["GPU"]]

    names = ray.get(held.options(scheduling_strategy=place).remote(), timeout=timeout_seconds)
    return sorted(names, key=lambda name: (len(name), name))
