"""Start the workers of a plan, with Ray or without, and hand the loop its roles."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

from megarlhf.cluster.group import WorkerGroup
from megarlhf.cluster.local_processes import local_processes
from megarlhf.cluster.processes import Processes
from megarlhf.cluster.rank_seconds import SlowestRanks, TimedRole
from megarlhf.cluster.replacement import EngineReplacement
from megarlhf.cluster.resource_manager import ResourceManager
from megarlhf.cluster.reward import RewardGroup
from megarlhf.cluster.roles import CheckpointGroup, RolloutGroup, TrainingGroup
from megarlhf.cluster.weight_sync import weight_sync
from megarlhf.cluster.workers import MegatronWorker, RolloutWorker, WorkerSpec
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.roles import PARTS, ROLES, RoleSpec, reward_roles, roles_of
from megarlhf.parallel.device import visible_devices_environment
from megarlhf.planner.placement import PlacementPlan, Worker
from megarlhf.planner.transport import Transport
from megarlhf.rollout.platform import engine_environment
from megarlhf.trainers.roles import RewardRole, Roles

_WORKERS: dict[str, Any] = {"megatron": MegatronWorker, "vllm": RolloutWorker}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A started run: roles for the loop, and what only set-up and the end need.

    Attributes:
        reward_models: by the names of their roles.
    """

    roles: Roles
    phases: ResourceManager
    actor: WorkerGroup
    checkpoints: CheckpointGroup
    reward_models: dict[str, RewardGroup]

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

    def export_beside(self, config: PPOConfig, directory: Path) -> None:
        """What is asked for beside the model: the average of its weights to hf_ema, the critic to hf_critic."""
        with self.phases.export():
            if config.optimizer.enable_ema:
                self.actor.call("export_average", str((directory / "hf_ema").absolute()))
            if config.model.save_value_network:
                self.checkpoints.roles["critic"].call("export", str((directory / "hf_critic").absolute()))

    def load(self, root: Path) -> dict[str, Any]:
        """Bring every role to the latest checkpoint under `root`; see CheckpointGroup.load."""
        with self.phases.load():
            return self.checkpoints.load(root)


@contextmanager
def start(
    config: PPOConfig,
    plan: PlacementPlan,
    *,
    transport: Transport,
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
    save = Path(config.logging.save).absolute()
    with open_groups(config, plan, roles_of(config), stop_token_ids=stop_token_ids) as groups:
        models = [group for group in groups.values() if group.role.runs == "megatron"]
        trained = {group.role.name: group for group in models if group.role.trains}
        phases = ResourceManager(models, groups["rollout"], show, colocated=config.cluster.colocate_all_models)
        checkpoints = CheckpointGroup(
            save / "checkpoints",
            trained,
            keep=config.logging.max_ckpt_num,
            most_gib=config.logging.max_ckpt_mem,
            identity=identity,
            with_optimizer=not config.logging.no_load_optim,
        )
        sync = weight_sync(groups["actor"], groups["rollout"], config, transport)
        replacement = EngineReplacement(
            groups["rollout"],
            sync.restore,
            most=config.cluster.max_restarts,
            start_timeout_seconds=config.cluster.start_timeout_seconds,
        )
        samples = config.batch.n_samples_per_prompt
        yield Cluster(
            roles=Roles(
                phases=phases,
                rollout=RolloutGroup(
                    groups["rollout"],
                    n_samples_per_prompt=samples,
                    at_once=config.rollout.max_num_seqs,
                    replace=replacement,
                    in_fp8=config.rollout_dtype == "fp8",
                ),
                reward=reward,
                actor=TrainingGroup(groups["actor"], groups["actor"].started),
                critic=TrainingGroup(critic, critic.started) if (critic := groups.get("critic")) else None,
                sync=sync,
                checkpoint=checkpoints,
                slowest_ranks=slowest_ranks(groups.values()),
                side_by_side=work_side_by_side(config, plan, [group.role for group in models]),
            ),
            phases=phases,
            actor=groups["actor"],
            checkpoints=checkpoints,
            reward_models=reward_models(config, groups),
        )


def slowest_ranks(groups: Iterable[WorkerGroup]) -> Callable[[], dict[str, float]]:
    """Metrics of a step's calls."""
    roles = [TimedRole(group.role.name, [spec.node for spec in group.specs], group.seconds) for group in groups]
    return SlowestRanks(roles).metrics


def work_side_by_side(config: PPOConfig, plan: PlacementPlan, roles: Sequence[RoleSpec]) -> bool:
    """Whether these roles never sleep, and no device has processes of two of them."""
    found = [{(worker.node, device) for worker in plan.of(role.name) for device in worker.devices} for role in roles]
    return not config.cluster.colocate_all_models and len(set().union(*found)) == sum(map(len, found))


def reward_models(config: PPOConfig, groups: Mapping[str, WorkerGroup]) -> dict[str, RewardGroup]:
    """Those of started groups, by the names of their roles; on the same devices they compute one after another."""
    turn = Lock() if config.cluster.colocate_all_models else nullcontext()
    return {
        role.name: RewardGroup(groups[role.name], groups[role.name].started, turn=turn)
        for role in reward_roles(config)
    }


def _engines(config: PPOConfig, workers: WorkerGroup) -> RolloutGroup:
    """As they were started, without the rest of a run."""
    samples, at_once = config.batch.n_samples_per_prompt, config.rollout.max_num_seqs
    return RolloutGroup(workers, n_samples_per_prompt=samples, at_once=at_once)


@contextmanager
def open_engines(
    config: PPOConfig, plan: PlacementPlan, *, stop_token_ids: tuple[int, ...]
) -> Iterator[RolloutGroup]:
    """The inference engines of a plan alone, with the weights of pretrain; ended after the block."""
    with open_groups(config, plan, [ROLES["rollout"]], stop_token_ids=stop_token_ids) as groups:
        yield _engines(config, groups["rollout"])


@contextmanager
def open_judged_engines(
    config: PPOConfig, plan: PlacementPlan, *, stop_token_ids: tuple[int, ...]
) -> Iterator[tuple[RolloutGroup, dict[str, RewardGroup], ResourceManager]]:
    """The inference engines, with the weights of pretrain, and the reward models of a plan; and their phases."""
    judges = reward_roles(config)
    with open_groups(config, plan, [*judges, ROLES["rollout"]], stop_token_ids=stop_token_ids) as groups:
        engines = _engines(config, groups["rollout"])
        asleep = [groups[role.name] for role in judges]
        colocated = config.cluster.colocate_all_models
        phases = ResourceManager(asleep, groups["rollout"], lambda phase: None, colocated=colocated)
        yield engines, reward_models(config, groups), phases


@contextmanager
def open_groups(
    config: PPOConfig,
    plan: PlacementPlan,
    roles: Sequence[RoleSpec],
    *,
    stop_token_ids: tuple[int, ...] = (),
) -> Iterator[dict[str, WorkerGroup]]:
    """The processes of these roles by the role's name, models loaded; they end with the block.

    Colocated models sleep, and engines are awake.

    Args:
        plan: has the workers of these roles, and maybe of others, which are not started.
    Raises:
        WorkerFailedError: a worker did not come up.
    """
    with _processes(config, plan) as processes, TemporaryDirectory(prefix="megarlhf-") as rendezvous:
        groups: dict[str, WorkerGroup] = {}
        for role in roles:
            specs = [_spec(config, plan, worker, stop_token_ids) for worker in plan.of(role.name)]
            launch, limit = partial(_launch, processes), config.cluster.phase_timeout_seconds
            handles = [launch(spec) for spec in specs]
            groups[role.name] = WorkerGroup(role, processes, handles, specs, launch=launch, timeout_seconds=limit)
        cluster, shared = config.cluster, rendezvous if config.cluster.ray_address is None else None
        start_workers(groups, shared, cluster.start_timeout_seconds, colocated=cluster.colocate_all_models)
        yield groups


def _processes(config: PPOConfig, plan: PlacementPlan) -> AbstractContextManager[Processes]:
    if config.cluster.ray is False:
        return local_processes()
    from megarlhf.cluster.ray_processes import ray_processes  # Ray: what runs without does not import it

    return ray_processes(config, plan)


def _launch(processes: Processes, spec: WorkerSpec) -> Any:
    spec = replace(spec, address=processes.addresses.get(spec.node))
    environment = {"OMP_NUM_THREADS": str(spec.threads), "HF_HUB_OFFLINE": "1"}
    if names := processes.device_names:
        environment |= visible_devices_environment([names[spec.node, device] for device in spec.devices])
    if spec.role.runs == "vllm":
        tensor_parallel_size = spec.config.cluster.vllm_tensor_parallel_size
        environment |= engine_environment(threads=spec.threads, tensor_parallel_size=tensor_parallel_size)
    return processes.start(_WORKERS[spec.role.runs], spec, environment)


def _spec(config: PPOConfig, plan: PlacementPlan, worker: Worker, stop_token_ids: tuple[int, ...]) -> WorkerSpec:
    return WorkerSpec(
        **vars(worker),
        config=config,
        world_size=len(plan.of(worker.role.name)),
        device_kind=plan.device_kind,
        stop_token_ids=stop_token_ids,
        directory=os.getcwd(),
        log_file=str(Path(config.logging.save).absolute() / "logs" / f"{worker.role.name}-{worker.rank}.log"),
    )


def start_workers(
    groups: dict[str, WorkerGroup], rendezvous: str | None, timeout_seconds: float, *, colocated: bool
) -> None:
    """Load every role; its ranks meet in a file in the directory `rendezvous`, or where that is None at a port.

    Roles that share devices load in turn and sleep, the engines last: vLLM measures the whole device while it starts,
    and would take what others allocate or free meanwhile for its own doing. Disjoint roles load side by side.
    """
    deadline = time.monotonic() + timeout_seconds
    starting: dict[str, list[Any]] = {}
    for role, group in groups.items():
        is_model, place = group.role.runs == "megatron", [f"file://{rendezvous}/{role}"]
        if is_model and rendezvous is None:  # a port of the first rank's node
            left = max(0.0, deadline - time.monotonic())
            place = group.wait_for([group.submit_to(0, "open_meeting")], "open_meeting", timeout_seconds=left)
        starting[role] = group.submit("start", *(place if is_model else ()))
        if colocated:
            _wait(group, starting.pop(role), deadline)
            if is_model:
                group.call("sleep", PARTS)
    for role, refs in starting.items():
        _wait(groups[role], refs, deadline)


def _wait(group: WorkerGroup, starting: list[Any], deadline: float) -> None:
    left = max(0.0, deadline - time.monotonic())
    group.started = group.wait_for(starting, "start", timeout_seconds=left)
