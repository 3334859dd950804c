"""Start Ray and every worker of a plan, and hand the loop its roles."""

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megarlhf.cluster.group import WorkerGroup
from megarlhf.cluster.nodes import devices_of
from megarlhf.cluster.resource_manager import ResourceManager
from megarlhf.cluster.roles import CheckpointGroup, RolloutGroup, TrainingGroup
from megarlhf.cluster.weight_sync import weight_sync
from megarlhf.cluster.workers import MegatronWorker, RolloutWorker, WorkerSpec
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.roles import PARTS, roles_of
from megarlhf.parallel.device import visible_devices_environment
from megarlhf.planner.placement import PlacementPlan, Worker, object_store_bytes
from megarlhf.rollout.engine import engine_environment
from megarlhf.trainers.roles import RewardRole, Roles

_WORKERS: dict[str, Any] = {"megatron": MegatronWorker, "vllm": RolloutWorker}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A started run: roles for the loop, and what only set-up and the end need."""

    roles: Roles
    phases: ResourceManager
    actor: WorkerGroup
    checkpoints: CheckpointGroup

    def export(self, directory: Path, *, of: Path | None = None) -> None:
        """Write the actor as a Hugging Face checkpoint.

        Args:
            of: checkpoint whose weights it takes first; None: as they are.
        """
        if of is not None:
            with self.phases.load():
                self.actor.call("load", str(of.absolute() / "actor"))
        with self.phases.export():
            self.actor.call("export", str(directory.absolute()))

    def load(self, root: Path) -> dict[str, Any]:
        """Bring every role to the latest checkpoint under `root`; see CheckpointGroup.load."""
        with self.phases.load():
            return self.checkpoints.load(root)


@contextmanager
def start(
    config: PPOConfig,
    plan: PlacementPlan,
    *,
    reward: RewardRole,
    stop_token_ids: tuple[int, ...],
    identity: dict[str, Any],
    show: Callable[[str], None],
) -> Iterator[Cluster]:
    """Everything running inside the block; all of it ended after, also when the block raises.

    Args:
        identity: what a checkpoint must agree with to be loaded.
        show: is told the name of each phase that begins.
    Raises:
        WorkerFailedError: a worker did not come up.
    """
    with ExitStack() as stack:
        _start_ray(config, plan, stack)
        groups: dict[str, WorkerGroup] = {}
        bundles = _reserve(plan, config.cluster.start_timeout_seconds)
        gpus = _gpus(plan, bundles, config.cluster.start_timeout_seconds)
        for role in roles_of(config):
            specs = [_spec(config, plan, worker, stop_token_ids) for worker in plan.of(role.name)]
            handles = [_launch(spec, bundles, gpus) for spec in specs]
            limit = config.cluster.phase_timeout_seconds
            groups[role.name] = WorkerGroup(role, handles, specs, timeout_seconds=limit)
        models = [group for group in groups.values() if group.role.runs == "megatron"]
        trained = {group.role.name: group for group in models if group.role.trains}
        rendezvous = stack.enter_context(TemporaryDirectory(prefix="megarlhf-"))
        colocated = config.cluster.colocate_all_models
        places = start_workers(groups, rendezvous, config.cluster.start_timeout_seconds, colocated=colocated)
        phases = ResourceManager(models, groups["rollout"], show, colocated=colocated)
        checkpoints = CheckpointGroup(
            Path(config.logging.save).absolute() / "checkpoints",
            trained,
            keep=config.logging.max_ckpt_num,
            most_gib=config.logging.max_ckpt_mem,
            identity=identity,
            with_optimizer=not config.logging.no_load_optim,
        )
        yield Cluster(
            roles=Roles(
                phases=phases,
                rollout=RolloutGroup(groups["rollout"], n_samples_per_prompt=config.batch.n_samples_per_prompt),
                reward=reward,
                actor=TrainingGroup(groups["actor"], places["actor"]),
                critic=TrainingGroup(groups["critic"], places["critic"]) if "critic" in groups else None,
                sync=weight_sync(
                    groups["actor"],
                    groups["rollout"],
                    nodes={worker.node for role in ("actor", "rollout") for worker in plan.of(role)},
                ),
                checkpoint=checkpoints,
            ),
            phases=phases,
            actor=groups["actor"],
            checkpoints=checkpoints,
        )


@contextmanager
def open_engines(
    config: PPOConfig, plan: PlacementPlan, *, stop_token_ids: tuple[int, ...]
) -> Iterator[RolloutGroup]:
    """The inference engines of a plan alone, with the weights of pretrain; ended after the block."""
    limit = config.cluster.start_timeout_seconds
    with ExitStack() as stack:
        _start_ray(config, plan, stack)
        bundles = _reserve(plan, limit)
        gpus = _gpus(plan, bundles, limit)
        specs = [_spec(config, plan, worker, stop_token_ids) for worker in plan.workers]
        handles = [_launch(spec, bundles, gpus) for spec in specs]
        group = WorkerGroup(
            plan.workers[0].role, handles, specs, timeout_seconds=config.cluster.phase_timeout_seconds
        )
        start_workers({"rollout": group}, "", limit, colocated=False)
        yield RolloutGroup(group, n_samples_per_prompt=config.batch.n_samples_per_prompt)


def _start_ray(config: PPOConfig, plan: PlacementPlan, stack: ExitStack) -> None:
    """A local Ray that only this run's token opens, or the cluster at --ray_address."""
    if config.cluster.ray_address is None:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
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
    stack.callback(ray.shutdown)


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


def _launch(spec: WorkerSpec, bundles: Any, gpus: Mapping[tuple[int, int], str]) -> Any:
    environment = {"OMP_NUM_THREADS": str(spec.threads), "HF_HUB_OFFLINE": "1"}
    if gpus:
        environment |= visible_devices_environment([gpus[spec.node, device] for device in spec.devices])
    if spec.role.runs == "vllm":
        tensor_parallel_size = spec.config.cluster.vllm_tensor_parallel_size
        environment |= engine_environment(threads=spec.threads, tensor_parallel_size=tensor_parallel_size)
    worker = ray.remote(_WORKERS[spec.role.runs])
    return worker.options(
        num_cpus=1,
        num_gpus=0,  # devices are shared by phases, so the plan assigns them and not Ray
        runtime_env={"env_vars": environment},
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=bundles, placement_group_bundle_index=spec.node
        ),
    ).remote(spec)


def _spec(config: PPOConfig, plan: PlacementPlan, worker: Worker, stop_token_ids: tuple[int, ...]) -> WorkerSpec:
    return WorkerSpec(
        **vars(worker),
        config=config,
        world_size=len(plan.of(worker.role.name)),
        device_kind=plan.device_kind,
        stop_token_ids=stop_token_ids,
        log_file=str(Path(config.logging.save).absolute() / "logs" / f"{worker.role.name}-{worker.rank}.log"),
    )


def start_workers(
    groups: dict[str, WorkerGroup], rendezvous: str, timeout_seconds: float, *, colocated: bool
) -> dict[str, list[Any]]:
    """Load every role; the ranks of a role meet in a file in the directory `rendezvous`, not at a port.

    Roles that share devices load in turn and sleep, the engines last: vLLM measures the whole device while it starts,
    and would take what others allocate or free meanwhile for its own doing. Disjoint roles load side by side.

    Returns:
        What each role's workers say of themselves.
    """
    deadline = time.monotonic() + timeout_seconds
    started: dict[str, list[Any]] = {}
    found: dict[str, list[Any]] = {}
    for role, group in groups.items():
        is_model = group.role.runs == "megatron"
        started[role] = group.submit("start", *((f"file://{rendezvous}/{role}",) if is_model else ()))
        if colocated:
            found[role] = _wait(group, started.pop(role), deadline)
            if is_model:
                group.call("sleep", PARTS)
    return found | {role: _wait(groups[role], refs, deadline) for role, refs in started.items()}


def _wait(group: WorkerGroup, started: list[Any], deadline: float) -> list[Any]:
    return group.wait_for(started, "start", timeout_seconds=max(0.0, deadline - time.monotonic()))
