"""What the nodes of a Ray cluster have, and which devices of them are this run's."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megarlhf.parallel.device import DeviceKind
from megarlhf.planner.placement import Machine


def joined_machine(address: str, *, nodes: int) -> Machine:
    """What each node of a running cluster has that a plan can count on.

    Raises:
        ValueError: it has fewer nodes.
    """
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        return machine_of(ray.nodes(), nodes=nodes)
    finally:
        ray.shutdown()


def machine_of(found: Sequence[Mapping[str, Any]], *, nodes: int) -> Machine:
    """The same from Ray's description of its nodes; where one has GPUs, those without do not count.

    Of nodes that differ the `nodes` with the most GPUs, then cores, are meant, and the least that one of them has.

    Raises:
        ValueError: there are fewer nodes.
    """
    shapes = [
        (int(node["Resources"].get("GPU", 0)), int(node["Resources"].get("CPU", 0))) for node in found if node["Alive"]
    ]
    kind: DeviceKind = "gpu" if any(gpus for gpus, _ in shapes) else "cpu"
    shapes = sorted(shape for shape in shapes if shape[0] or kind == "cpu")[-nodes:]
    if len(shapes) < nodes:
        raise ValueError(
            f"actor_num_nodes={nodes} is above the {len(shapes)} node(s) of the Ray cluster"
            + (" with GPUs" if kind == "gpu" else "")
            + ": start more, or set it lower"
        )
    return Machine(
        kind=kind,
        nodes=nodes,
        gpus_per_node=min(gpus for gpus, _ in shapes),
        cores_per_node=max(1, min(cores for _, cores in shapes)),
    )


def devices_of(bundles: Any, node: int, num_gpus: int, *, timeout_seconds: float) -> list[str]:
    """Names of the GPUs that Ray holds in a bundle, as CUDA_VISIBLE_DEVICES has them: numbers or UUIDs.

    Ray takes them from what the node was started with, so they are this job's, whichever other jobs share the node.
    """

    @ray.remote(num_cpus=0, num_gpus=num_gpus)
    def held() -> list[str]:
        return [str(device) for device in ray.get_runtime_context().get_accelerator_ids()["GPU"]]

    strategy = PlacementGroupSchedulingStrategy(placement_group=bundles, placement_group_bundle_index=node)
    names = ray.get(held.options(scheduling_strategy=strategy).remote(), timeout=timeout_seconds)
    return sorted(names, key=lambda name: (len(name), name))
