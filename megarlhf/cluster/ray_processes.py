"""Worker processes as Ray's actors, on this machine or on the nodes of a cluster."""

import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megarlhf.cluster.nodes import devices_of
from megarlhf.cluster.processes import CallFailedError, ProcessDiedError, ProcessError, Processes
from megarlhf.config.arguments import PPOConfig
from megarlhf.planner.placement import PlacementPlan, object_store_bytes

TOKEN = secrets.token_hex(32)  # of what this process starts; Ray reads it once


@contextmanager
def ray_processes(config: PPOConfig, plan: PlacementPlan) -> Iterator[Processes]:
    """Ray with room for the workers of a plan; they end with the block.

    Raises:
        RuntimeError: the cluster has no such room.
    """
    _start_ray(config, plan)
    try:
        bundles = _reserve(plan, config.cluster.start_timeout_seconds)
        yield RayProcesses(bundles, _gpus(plan, bundles, config.cluster.start_timeout_seconds))
    finally:
        ray.shutdown()


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

    def __init__(self, bundles: Any, device_names: Mapping[tuple[int, int], str]) -> None:
        self.store, self._bundles, self.device_names = RayStore(), bundles, device_names

    def start(self, worker: Any, spec: Any, environment: Mapping[str, str]) -> Any:
        """See Processes."""
        options = ray.remote(worker).options(
            num_cpus=1,
            num_gpus=0,  # devices are shared by phases, so the plan assigns them and not Ray
            runtime_env={"env_vars": dict(environment)},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self._bundles, placement_group_bundle_index=spec.node
            ),
        )
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
            raise CallFailedError(error.cause if isinstance(error.cause, Exception) else error) from error
        except ray.exceptions.RayError as error:
            raise ProcessError(str(error)) from error

    def kill(self, handle: Any) -> None:
        """See Processes."""
        ray.kill(handle)


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


def _reserve(plan: PlacementPlan, timeout_seconds: float) -> Any:
    """One Ray placement bundle per node of the plan, with its workers' share of CPUs and GPUs."""
    nodes = sorted({worker.node for worker in plan.workers})
    bundles = []
    for node in nodes:
        here = [worker for worker in plan.workers if worker.node == node]
        bundle = {"CPU": float(len(here))}
        gpus = {device for worker in here for device in worker.devices}
        if plan.device_kind != "cpu":
            bundle["GPU"] = float(len(gpus))
        bundles.append(bundle)
    group = placement_group(bundles, strategy="STRICT_SPREAD" if len(nodes) > 1 else "STRICT_PACK")
    ready, _ = ray.wait([group.ready()], timeout=timeout_seconds)
    if not ready:
        raise RuntimeError(
            f"Ray did not find room for {bundles} within start_timeout_seconds={timeout_seconds:g}: the cluster has "
            f"{ray.cluster_resources()}; start more nodes, or ask for fewer ranks"
        )
    return group


def _gpus(plan: PlacementPlan, bundles: Any, timeout_seconds: float) -> dict[tuple[int, int], str]:
    """Names of the GPUs that Ray gave, by node and the plan's number; none on CPUs."""
    if plan.device_kind == "cpu":
        return {}
    places = sorted({(worker.node, device) for worker in plan.workers for device in worker.devices})
    names: list[str] = []
    for node in sorted({node for node, _ in places}):
        count = sum(place[0] == node for place in places)
        names += devices_of(bundles, node, count, timeout_seconds=timeout_seconds)
    return dict(zip(places, names, strict=True))
