"""The run of train_ppo.py and train_ppo_ray.py, once checked: plan, load, start the cluster, train, export."""

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from megarlhf.cli.disk import check_disk_space, check_shared_memory
from megarlhf.cli.errors import all_or_errors, machine_checks, running
from megarlhf.cli.memory import MemoryPlan, fitting_memory
from megarlhf.cli.pretraining import load_pretraining, write_pretraining
from megarlhf.cli.prompt_data import load_data, resolve_special_tokens
from megarlhf.cli.rewards import model_sources, reward_identity, reward_sources
from megarlhf.cli.run import (
    Opened,
    StopSignal,
    check_best_metric,
    check_loaded_files,
    check_weights,
    data_identity,
    kernel_lines,
    model_identity,
    open_run_directory,
    open_sinks,
    resolve_kernels,
    resolved_files,
    resumed_step,
)
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import to_dict, to_yaml
from megarlhf.config.layouts import TransformerImpl
from megarlhf.config.precision import precision_lines
from megarlhf.config.roles import first_given, layout_lines, megatron_roles, unread_counts
from megarlhf.data.prompts import PromptData
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import Prompt
from megarlhf.formats import run_checkpoints
from megarlhf.formats.data_names import named_sets
from megarlhf.formats.huggingface import HFConfig
from megarlhf.metrics.report import write_report
from megarlhf.parallel.device import device_kind, num_cores, num_local_gpus
from megarlhf.planner.placement import Machine, asked_nodes, object_store_bytes, plan_placement
from megarlhf.planner.transport import Transport, plan_transport
from megarlhf.reward.sources import SumOfSources
from megarlhf.trainers import rl
from megarlhf.trainers.best import Best
from megarlhf.trainers.evaluation import metric_names
from megarlhf.trainers.pretraining import pretraining_directory
from megarlhf.trainers.roles import NodeLostError, RoleFailedError
from megarlhf.trainers.state import LoopState


def resolve(config: PPOConfig, transformer_impl: TransformerImpl) -> PPOConfig:
    """Fill in what was left open.

    Prompts are shared where several samples of one are trained together, if layers can: TransformerEngine's attention
    has no mask of a shared prompt. What vLLM sampled is weighed unless all phases are in fp32.
    """
    batch = config.batch
    share = (
        batch.n_samples_per_prompt > 1
        and batch.global_batch_size % batch.n_samples_per_prompt == 0
        and all(role.layout(config).context_parallel_size == 1 for role in megatron_roles(config) if role.trains)
        and transformer_impl == "local"
    )
    if batch.share_prompt_prefix is None:
        batch = replace(batch, share_prompt_prefix=share)
    algorithm = replace(config.algorithm, use_tis=config.uses_tis)
    return replace(config, algorithm=algorithm, batch=batch)


def find_machine(config: PPOConfig, *, dry_run: bool = False) -> Machine:
    """The nodes of the Ray cluster that is joined, or this machine; for a dry run as many like it as are asked for.

    Raises:
        ValueError: several nodes are asked for, and no cluster is joined.
    """
    address, gpus = config.cluster.ray_address, num_local_gpus()
    if address is not None:
        from megarlhf.cluster.nodes import joined_machine

        return joined_machine(address)
    asked = [first_given(config.cluster, role.workers[0]) for role in megatron_roles(config)]
    option, most = max(asked, key=itemgetter(1), default=("", 1))
    if most > 1 and not dry_run:
        raise ValueError(f"{option}={most} needs a running Ray cluster: set ray_address (RAY_AUTH_TOKEN has its token)")
    nodes = asked_nodes(config, gpus) if most > 1 else 1
    return Machine.alike(device_kind(), nodes, gpus, num_cores())


def _check_models(
    config: PPOConfig, transformer_impl: TransformerImpl, transport: Transport, *, dry_run: bool
) -> tuple[list[Opened], MemoryPlan]:
    """The weights of every role, and room for them: on the devices, and where vLLM is to read the actor's."""
    roles = megatron_roles(config)

    def opened(trains: bool, **options: Any) -> list[Opened]:
        starts = [(*role.start(config), role.layout(config), role.head) for role in roles if role.trains == trains]
        return check_weights(starts, transformer_impl=transformer_impl, **options)

    trained = partial(opened, True, generates=True, lora=config.lora)
    # In the table those that train stand first.
    models: list[Opened] = [model for part in all_or_errors([trained, partial(opened, False)]) for model in part]
    # A cluster's store stands already; without Ray tokens lie in memory that has no place there.
    store = object_store_bytes(config) if config.cluster.ray is not False and config.cluster.ray_address is None else 0

    def share() -> None:
        if transport.name != "shared_memory":
            return
        with machine_checks(dry_run=dry_run):
            check_shared_memory(models[0].config, bf16=config.model.bf16, object_store_bytes=store)

    _, memory = all_or_errors([share, lambda: fitting_memory(config, [model.config for model in models])])
    return models, memory


class Inputs(NamedTuple):
    """What a run reads before anything starts."""

    prompts: PromptData
    eval_sets: dict[str, list[Prompt]]  # by name
    pretraining: SupervisedData | None
    stop_tokens: tuple[int, ...]
    models: list[HFConfig]  # of each role that is Megatron's
    identity: dict[str, Any]  # what a checkpoint must agree with
    continued: int | None  # step of the checkpoint to continue from
    memory: MemoryPlan
    total_steps: int  # RL steps of the run


def total_steps(config: PPOConfig, prompts: PromptData) -> int:
    """RL steps of the run: train_iters, or those of num_episodes passes over the prompts.

    Raises:
        ValueError: the critic's warm-up takes all of them.
    """
    batch, frozen = config.batch, config.optimizer.freezing_actor_steps
    steps = batch.train_iters or max(1, batch.num_episodes * len(prompts.prompts) // batch.rollout_batch_size)
    if frozen >= steps:
        raise ValueError(
            f"freezing_actor_steps={frozen} leaves none of the {steps} steps that num_episodes={batch.num_episodes} "
            f"makes of {len(prompts.prompts)} prompts to train the actor: use fewer, or more episodes"
        )
    return steps


def load_inputs(
    config: PPOConfig,
    reward: SumOfSources,
    transformer_impl: TransformerImpl,
    transport: Transport,
    *,
    dry_run: bool,
) -> Inputs:
    """Read and check all of it, for a dry run too.

    Raises:
        ConfigError: what is wrong with any of them.
    """
    roles = megatron_roles(config)
    layouts = [role.layout(config) for role in roles if role.trains]
    identity = model_identity(config.model.pretrain, *layouts, lora=config.lora) | {
        "advantage_estimator": config.algorithm.advantage_estimator,
        "seed": config.model.seed,
        "enable_ema": config.optimizer.enable_ema or None,  # as in checkpoints from before there were averages
    }
    names = metric_names([name for name, _ in named_sets(config.evaluation.eval_data or "")], config)
    (prompts, eval_sets, stop_tokens), pretraining, continued, (models, memory), *_ = all_or_errors(
        [
            lambda: load_data(config),
            lambda: load_pretraining(config),
            lambda: resumed_step(config.logging, identity),
            lambda: _check_models(config, transformer_impl, transport, dry_run=dry_run),
            reward.check,
            lambda: check_best_metric(config.logging, names),
            lambda: check_loaded_files(config.logging),
        ]
    )
    identity |= {"data": data_identity(len(prompts.prompts), prompts.fingerprint)}
    identity["pretrain_data"] = pretraining and data_identity(len(pretraining), pretraining.fingerprint)
    identity["reward_models"] = reward_identity(config)
    resumed_step(config.logging, identity)  # again, now that data and models are known
    steps = total_steps(config, prompts)
    with machine_checks(dry_run=dry_run):
        trained = [model for model, role in zip(models, roles, strict=True) if role.trains]
        check_disk_space(config, trained, first_step=continued or 0, last_step=steps)
    configs = [model.config for model in models]
    return Inputs(prompts, eval_sets, pretraining, stop_tokens, configs, identity, continued, memory, steps)


def with_restarts(
    config: PPOConfig,
    attempt: Callable[[PPOConfig, int | None], Best],
    *,
    continued: int | None,
    max_restarts: int,
    should_stop: Callable[[], bool],
) -> Best:
    """What an attempt at the run returns; where a role fails, of another one from the last checkpoint.

    Args:
        attempt: is told the configuration, whose logging.load names what to continue from, and the step of that; -1: it
            begins anew.
        continued: step that the first attempt continues from; None: a fresh run.
    Raises:
        RoleFailedError: of the last attempt that max_restarts allows, or of one that is to stop.
        NodeLostError: there are too few nodes for another attempt.
    """
    root, left = Path(config.logging.save), max_restarts
    while True:
        try:
            return attempt(config, continued)
        except NodeLostError as error:
            if (load := config.logging.load) is not None:
                error.add_note(f"continue with load={load}, whose last checkpoint is of step {continued}")
            raise
        except RoleFailedError as error:
            if should_stop() or not left:
                raise
            said = "\n".join([str(error).splitlines()[0], *getattr(error, "__notes__", [])])
        continued = -1 if continued is None else continued  # not even what was measured before the first step
        if (root / "checkpoints" / run_checkpoints.LATEST).exists():
            continued, _, _ = run_checkpoints.latest(root / "checkpoints")
            config = replace(config, logging=replace(config.logging, load=str(root)))
        step, left = max(continued, 0), left - 1
        print(f"{said}\nstarting again after step {step}; max_restarts leaves {left} more", file=sys.stderr)


def run(config: PPOConfig, *, dry_run: bool) -> int:
    """Plan and run; returns the exit status."""
    layouts = [(role.prefix, role.layout(config)) for role in megatron_roles(config)]
    machine, shared = find_machine(config, dry_run=dry_run), bool(config.batch.share_prompt_prefix)
    transformer_impl = resolve_kernels(config, layouts, share_prompt_prefix=shared, device=machine.kind)
    config = resolve(config, transformer_impl)
    if unread := unread_counts(config):
        given = ", ".join(f"{option}={number}" for option, number in unread.items())
        print(f"note: {given} without effect: the run has no such role", file=sys.stderr)
    plan = plan_placement(config, machine)
    transport = plan_transport(config, plan)
    if (interface := config.cluster.network_interface) and len({worker.node for worker in plan.workers}) == 1:
        print(f"note: network_interface={interface} without effect: the run is on one node", file=sys.stderr)
    models = model_sources(config)
    sources = [*models, *reward_sources(config.reward, dry_run=dry_run)]
    reward = SumOfSources(sources, config.reward.reward_weights)
    inputs = load_inputs(config, reward, transformer_impl, transport, dry_run=dry_run)
    kernels = kernel_lines(config.kernels, inputs.models, device=plan.device_kind)
    epochs = inputs.total_steps * config.batch.rollout_batch_size / len(inputs.prompts.prompts)
    lines = [f"{inputs.total_steps} steps, {epochs:.3g} passes over the prompts", *layout_lines(config)]
    lines += [model.line() for model in models]
    trained = [role.name for role in megatron_roles(config) if role.trains]
    lines += precision_lines(config.precision, bf16=config.model.bf16, roles=trained)
    decided = "\n".join([plan.table(), transport.line(), *lines, f"{kernels}\n", inputs.memory.text()])
    prompts, eval_sets, stops = inputs.prompts, inputs.eval_sets, inputs.stop_tokens
    labels = [prompt.label for members in (prompts.prompts, *eval_sets.values()) for prompt in members]
    config = resolve_special_tokens(config, labels)
    if dry_run:
        reward.close()
        print(to_yaml(config) + "\n" + resolved_files(config.model, config.data) + "\n\n" + decided)
        return 0
    from megarlhf.cluster import launch  # the workers and, maybe, Ray: nothing above needs them

    logging, total = config.logging, inputs.total_steps
    directory = open_run_directory(logging.save, to_yaml(config), ckpt_path=logging.ckpt_path)
    write_pretraining(inputs.pretraining, pretraining_directory(config))
    config = replace(config, batch=replace(config.batch, train_iters=total))  # config.yaml keeps what was asked for
    stop = StopSignal()
    print(decided)

    def attempt(config: PPOConfig, continued: int | None) -> Best:
        with closing(open_sinks(logging, to_dict(config), total_steps=total, resumed_step=continued)) as sinks:
            sinks.phase("start")
            started = launch.start(
                config,
                plan,
                transport=transport,
                reward=reward,
                stop_token_ids=stops,
                identity=inputs.identity,
                show=sinks.phase,
            )
            with running(), started as cluster:
                stop.listen()  # starting Ray takes SIGTERM
                for model in models:
                    model.model = cluster.reward_models[model.role]
                state = LoopState.fresh(config.algorithm)
                if config.logging.load is not None:
                    state.restore(cluster.load(Path(config.logging.load) / "checkpoints"))
                rl.train(config, cluster.roles, prompts, eval_sets, state, sinks, stop)
                cluster.export(directory / "hf")
                cluster.export_beside(config, directory)
                if (kept := state.best.directory(logging)) is not None:
                    cluster.export(directory / "hf_best", of=kept)
                return state.best

    try:
        most = config.cluster.max_restarts
        best = with_restarts(config, attempt, continued=inputs.continued, max_restarts=most, should_stop=stop)
    finally:
        reward.close()
        write_pretraining(None, pretraining_directory(config))
    with running():
        page, picture = write_report(directory, f"megarlhf ppo: {directory.name}")
    if best.directory(logging) is not None:
        print(f"best: {best}, {directory / 'hf_best'}")
    print(f"model: {directory / 'hf'}\nreport: {page} and {picture}")
    return 0
