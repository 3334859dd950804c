"""Does a run fit its devices: from its configuration to bytes by role, part and phase, and what to change if not."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.check_layout import cluster_errors, world_errors
from megarlhf.config.checks import check_ppo, check_supervised
from megarlhf.config.kd_arguments import KDConfig
from megarlhf.config.layouts import LayoutArguments
from megarlhf.config.lora import LoraArguments
from megarlhf.config.precision import wide_dtype
from megarlhf.config.roles import ROLES, RoleSpec, roles_of
from megarlhf.config.supervised_arguments import SupervisedConfig
from megarlhf.formats.huggingface import HFConfig
from megarlhf.models.names import padded_vocab_size
from megarlhf.models.registry import find_architecture
from megarlhf.models.sizes import engine_sizes, kv_numbers_per_token, layer_widths, stage_sizes
from megarlhf.parallel.bucket_stream import NUM_IN_FLIGHT
from megarlhf.parallel.device import device_memory_bytes, host_memory_bytes
from megarlhf.planner.memory import RankBytes, Work, rank_bytes
from megarlhf.planner.memory_table import (
    GIB,
    Column,
    DeviceTable,
    EngineBytes,
    Place,
    RoleBytes,
    device_tables,
    host_table,
    misfits,
)
from megarlhf.planner.placement import Machine, asked_nodes, plan_placement
from megarlhf.planner.transport import ways_between

Config = PPOConfig | SupervisedConfig
_WITHOUT_TRAINING = (
    "set bf16, a larger reward_tensor_model_parallel_size or reward_pipeline_model_parallel_size with as many "
    "reward_num_gpus_per_node, or fewer tokens at a time (micro_batch_size; of serve-rm max_batch_tokens)"
)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Tables of a run, and what does not fit."""

    tables: list[DeviceTable]
    host: DeviceTable  # of the fullest node
    memory: int | None  # bytes of a device; None where they are not known
    host_memory: int | None  # of a node's host
    misfits: list[tuple[str, str]]  # phase and sentence

    @property
    def peak(self) -> int:
        """Most bytes on any device in any phase."""
        return max(table.total(table.peak_phase) for table in self.tables)

    def text(self) -> str:
        """All tables, and what they were not compared with."""
        parts = [table.text(self.memory) for table in self.tables] + [self.host.text(self.host_memory)]
        if self.memory is None:
            parts.append("note: no GPU here and no gpu_memory_gib: compared with no device's memory")
        return "\n\n".join(parts)


def plan_memory(
    config: Config, models: Sequence[HFConfig], *, only: Sequence[RoleSpec] | None = None
) -> MemoryPlan:
    """Bytes on each device.

    Args:
        models: the configuration of each model of Megatron's, as read_checkpoint gives it, the policy's first; with
            `only` the policy's if that has engines.
        only: what is started of an RL run, without training. None: all roles.
    """
    cluster = config.cluster if isinstance(config, PPOConfig) else config.ranks
    memory = device_memory_bytes() if cluster.gpu_memory_gib is None else int(cluster.gpu_memory_gib * GIB)
    host_memory = host_memory_bytes() if memory and cluster.gpu_memory_gib is None else None
    if cluster.host_memory_gib is not None:
        host_memory = int(cluster.host_memory_gib * GIB)
    gpu, resident = memory is not None, config.keeps_resident
    if isinstance(config, SupervisedConfig):
        model, *teachers = models
        reference = config.keeps_reference
        ranks = _training_ranks(config, model, config.head, config.layout, config.world_size, has_reference=reference)
        for teacher in teachers:
            ranks = _beside_teacher(config, ranks, teacher)
        slots: dict[Place, dict[str, RoleBytes]] = {
            divmod(rank, config.ranks.num_gpus_per_node): {"actor": taken} for rank, taken in enumerate(ranks)
        }
        engine, colocated = None, False
    else:
        roles, colocated = roles_of(config) if only is None else only, config.cluster.colocate_all_models
        of_megatron = [role for role in roles if role.runs == "megatron"]
        engine = _engine(config, models[0], memory) if len(of_megatron) < len(roles) else None
        slots = _slots(config, of_megatron, models[len(models) - len(of_megatron) :], engine)
        slots = _with_buckets(config, models[0], slots, gpu=gpu)
    tables = device_tables(slots, colocated=colocated, gpu=gpu, resident=resident)
    if only is not None:
        tables = [replace(table, phases=_without_training(table.phases)) for table in tables]
    host = host_table(slots, colocated=colocated, resident=resident, gpu=gpu)
    found = [] if memory is None else misfits(tables, engine, memory)
    found += [] if host_memory is None else misfits([host], None, host_memory)
    return MemoryPlan(tables=tables, host=host, memory=memory, host_memory=host_memory, misfits=found)


def _without_training(phases: dict[str, Column]) -> dict[str, Column]:
    return {phase: column for phase, column in phases.items() if phase not in ("sync", "save")}


def fitting_memory(
    config: Config, models: Sequence[HFConfig], *, only: Sequence[RoleSpec] | None = None
) -> MemoryPlan:
    """The plan of a run that fits its devices; arguments as for `plan_memory`.

    Raises:
        ValueError: it does not; names role, phase, bytes and the two smallest changes that make it fit.
    """
    plan = plan_memory(config, models, only=only)
    if not plan.misfits:
        return plan
    sizes = {"gpu_memory_gib": plan.memory, "host_memory_gib": plan.host_memory}
    given = ", ".join(f"{name}={size / GIB:.4g}" for name, size in sizes.items() if size is not None)
    said = "; ".join(sentence for _, sentence in plan.misfits)
    remedies = _remedies(config, models) if only is None else _WITHOUT_TRAINING
    raise ValueError(f"{given}; {said}: {remedies}\n{plan.text()}")


def _slots(
    config: PPOConfig, of_megatron: Sequence[RoleSpec], models: Sequence[HFConfig], engine: EngineBytes | None
) -> dict[Place, dict[str, RoleBytes]]:
    """What lies on each device, of nodes that have as many as are asked for."""
    by_role: dict[str, Sequence[RoleBytes]] = {}
    for spec, hf in zip(of_megatron, models, strict=True):
        layout, world_size, reference = spec.layout(config), spec.num_workers(config), spec.keeps_reference(config)
        own = config if spec.trains else replace(config, lora=LoraArguments())
        by_role[spec.name] = _training_ranks(own, hf, spec.head, layout, world_size, has_reference=reference)
    if engine is not None:
        by_role["rollout"] = [engine] * config.cluster.vllm_num_engines
    roles = [*of_megatron, *([ROLES["rollout"]] if engine is not None else [])]
    slots, taken = dict[Place, dict[str, RoleBytes]](), Counter[tuple[int, str]]()
    plan = plan_placement(config, Machine.alike("cpu", asked_nodes(config, 0), 0, 1), only=roles)  # without a limit
    for worker in plan.workers:
        name = worker.role.name
        there = worker.node, name if config.cluster.colocate_all_models else ""
        for _ in range(worker.role.devices_per_worker(config)):
            slots.setdefault((worker.node, taken[there]), {})[name] = by_role[name][worker.rank]
            taken[there] += 1
    return slots


def _with_buckets(
    config: PPOConfig, hf: HFConfig, slots: dict[Place, dict[str, RoleBytes]], *, gpu: bool
) -> dict[Place, dict[str, RoleBytes]]:
    """The same with the buckets in which weights travel, for full ones on every rank of the actor.

    Engines that read them on the actor's devices have none of their own, and where they read the host's shared memory
    there are none.
    """
    senders, receivers = ({place for place, held in slots.items() if role in held} for role in ("actor", "rollout"))
    if not (senders and receivers):
        return slots
    way: str | None = config.cluster.weight_transport
    if way == "auto":
        way = next(iter(ways_between(senders, receivers, on_gpu=gpu)), None)
    holders = {"ipc": ["actor"], "broadcast": ["actor", "rollout"]}.get(way or "", [])
    whole = engine_sizes(find_architecture(hf), hf, tensor=1)[0] * (2 if config.model.bf16 else 4)
    taken = NUM_IN_FLIGHT * min(config.cluster.update_weight_buffer_mib * 2**20, whole)
    return {
        place: held | {role: replace(held[role], weight_buckets=taken) for role in holders if role in held}
        for place, held in slots.items()
    }


def _training_ranks(
    config: Config, hf: HFConfig, head: str, layout: LayoutArguments, world_size: int, *, has_reference: bool
) -> list[RankBytes]:
    """Each rank of one model; Megatron numbers pipeline stages last."""
    arch = find_architecture(hf)
    tp, pp, cp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.context_parallel_size
    etp, data = layout.expert_tensor_parallel_size or tp, world_size // (tp * pp * cp)
    optimizer = config.optimizer
    micro_batches = -(-config.batch.global_batch_size // data)
    if isinstance(config, PPOConfig) and config.pretraining.pretrain_data is not None:
        micro_batches *= 2  # of as many documents
    work = Work(
        bf16=config.model.bf16,
        tensor=tp,
        pipeline=pp,
        virtual=layout.virtual_stages,
        expert_tensor=etp,
        sequence_parallel=layout.sequence_parallel,
        replicas=data * cp,
        expert_replicas=world_size // (layout.expert_model_parallel_size * etp * pp),
        distributed_optimizer=layout.use_distributed_optimizer,
        recompute=layout.recompute_granularity,
        recompute_method=layout.recompute_method,
        recompute_num_layers=layout.recompute_num_layers,
        tokens=-(-config.micro_batch_tokens // cp),
        micro_batches=-(-micro_batches // pp) * pp if layout.virtual_stages > 1 else micro_batches,
        vocabulary=padded_vocab_size(hf.vocab_size, tp) if head == "lm" else 0,
        logprob_chunk_tokens=config.batch.logprob_chunk_tokens,
        has_reference=has_reference and not config.lora.lora_rank,  # adapters off are the reference
        offload_fraction=optimizer.optimizer_offload_fraction if optimizer.optimizer_cpu_offload else 0.0,
    )
    stages = stage_sizes(arch, hf, layout, head=head, lora=config.lora)
    widths = layer_widths(arch, hf, lora=config.lora)

    @cache
    def of(stage: int, collects: tuple[bool, bool]) -> RankBytes:
        return rank_bytes(stages, widths, work, stage=stage, collects=collects)

    # Megatron's order: tensor, context and data ranks, then stages; of experts tensor, expert and data ranks.
    blocks = (tp, work.replicas), (etp * layout.expert_model_parallel_size, work.expert_replicas)

    def is_first(rank: int) -> tuple[bool, bool]:
        dense, experts = (rank // block % replicas == 0 for block, replicas in blocks)
        return dense, experts

    return [of(rank // (world_size // pp), is_first(rank)) for rank in range(world_size)]


def _beside_teacher(config: SupervisedConfig, ranks: list[RankBytes], teacher: HFConfig) -> list[RankBytes]:
    """Each rank with what a teacher adds: its weights while it computes, then a copy of its output layer's.

    Beside the student's logits there is a chunk of the teacher's. With teacher_top_k neither is there in an update.
    """
    stays = not (isinstance(config, KDConfig) and config.kd.teacher_top_k)
    layout, bf16 = config.layout, config.model.bf16
    alone = replace(config, lora=LoraArguments())
    theirs = _training_ranks(alone, teacher, "lm", layout, config.world_size, has_reference=False)
    tp = layout.tensor_model_parallel_size
    output = padded_vocab_size(teacher.vocab_size, tp) // tp * teacher.hidden_size * (2 if bf16 else 4)
    hidden = (-(-config.micro_batch_tokens // layout.context_parallel_size)) * teacher.hidden_size
    hidden *= 8 + (2 if bf16 else 4)  # what its output layer takes: as it comes, the targets', and these in its dtype
    return [
        replace(
            own,
            teacher=other.parameters,
            teacher_output=output if other.logits and stays else 0,
            forward=other.forward,
            logits=own.logits + (other.logits + hidden if stays and other.logits else 0),
        )
        for own, other in zip(ranks, theirs, strict=True)
    ]


def _engine(config: PPOConfig, hf: HFConfig, memory: int | None) -> EngineBytes:
    arch, rollout, tensor = find_architecture(hf), config.rollout, config.cluster.vllm_tensor_parallel_size
    # Of an engine in FP8 the wider type counts, which it may fall back to.
    dtype = wide_dtype(bf16=config.model.bf16) if config.rollout_dtype == "fp8" else config.rollout_dtype
    element = 4 if dtype == "fp32" else 2
    weights, largest = (number * element for number in engine_sizes(arch, hf, tensor=tensor))
    share = int(rollout.vllm_kv_cache_gib * GIB)
    if memory is not None:
        share = max(0, math.ceil(memory * rollout.vllm_gpu_memory_utilization) - weights)
    return EngineBytes(
        weights=weights,
        kv_cache=share,
        one_sequence=config.max_row_tokens * kv_numbers_per_token(arch, hf, tensor=tensor) * element,
        # On a CPU without tensor parallelism new kernels of all weights are packed before the old ones go.
        bucket=weights if memory is None and tensor == 1 else largest,
    )


def _remedies(config: Config, models: Sequence[HFConfig]) -> str:
    """The two smallest changes that make it fit, those that cost the least speed first; else two pairs of changes."""
    found = list(itertools.islice(_fitting(config, models), 2))
    if not found:
        pairs = (
            f"{_said(change)} with {second}"
            for kind in _changes(config)
            for change in kind[-1:]
            for second in itertools.islice(_fitting(_changed(config, change), models), 1)
        )
        found = list(itertools.islice(pairs, 2))
    return f"set {' or '.join(found)}" if found else "no two changes make it fit: use more or larger GPUs"


def _fitting(config: Config, models: Sequence[HFConfig]) -> Iterator[str]:
    """The first change of each kind that makes it fit, in words."""
    for kind in _changes(config):
        peaks = ((change, _peak_if_it_runs(_changed(config, change), models)) for change in kind)
        fitting = (f"{_said(change)} (peak {peak / GIB:.2f} GiB)" for change, peak in peaks if peak is not None)
        yield from itertools.islice(fitting, 1)


def _peak_if_it_runs(config: Config, models: Sequence[HFConfig]) -> int | None:
    """Most bytes of a configuration that fits and that the checks pass; None for any other."""
    if isinstance(config, PPOConfig):
        possible = not cluster_errors(config)
    else:
        possible = not world_errors("", config.world_size, config.layout, config.batch.global_batch_size)
    plan = plan_memory(config, models) if possible else None
    if plan is None or plan.misfits:
        return None
    return None if (check_ppo(config) if isinstance(config, PPOConfig) else check_supervised(config)) else plan.peak


Change = tuple[str, dict[str, Any]]  # a group of options, and their new values


def _said(change: Change) -> str:
    return ", ".join(f"{name}={value}" for name, value in change[1].items())


def _changed(config: Config, change: Change) -> Any:
    group, values = change
    return replace(config, **{group: replace(getattr(config, group), **values)})


def _changes(config: Config) -> Iterator[list[Change]]:
    """Ways to take less memory, those that cost the least speed first; of each the smallest change first.

    Sizes that do not divide are found by the checks.
    """
    layout, tokens = config.layout, config.micro_batch_tokens
    if isinstance(config, PPOConfig):  # less for the engines, in twentieths; then more, for too small a KV cache
        now = round(20 * config.rollout.vllm_gpu_memory_utilization, 6)
        steps = (*range(math.ceil(now) - 1, 0, -1), *range(math.floor(now) + 1, 20))
        yield [("rollout", {"vllm_gpu_memory_utilization": step / 20}) for step in steps]
    for name in ("use_distributed_optimizer", "sequence_parallel"):
        yield [] if getattr(layout, name) else [("layout", {name: True})]
    halves = [tokens >> n for n in range(1, tokens.bit_length()) if tokens >> n > config.max_row_tokens]
    yield [("batch", {"max_tokens_per_micro_batch": number}) for number in (*halves, config.max_row_tokens)]
    if isinstance(config, PPOConfig):
        tensor, engines = config.cluster.vllm_tensor_parallel_size, config.cluster.vllm_num_engines
        yield [
            ("cluster", {"vllm_tensor_parallel_size": tensor * factor, "vllm_num_engines": engines // factor})
            for factor in (2, 4, 8)
            if engines % factor == 0
        ]
    if layout.recompute_granularity != "full":
        full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        yield [("layout", full)]
    tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    yield [("layout", {"tensor_model_parallel_size": tensor * n, "sequence_parallel": True}) for n in range(2, 9)]
    yield [("layout", {"pipeline_model_parallel_size": pipeline * n}) for n in range(2, 9)]
    offload = [("optimizer", {"optimizer_cpu_offload": True})] if layout.use_distributed_optimizer else []
    yield [] if config.optimizer.optimizer_cpu_offload else offload
    if isinstance(config, PPOConfig):
        yield [("cluster", {"actor_num_gpus_per_node": 2 * config.cluster.actor_num_gpus_per_node})]
    else:
        yield [("ranks", {"num_gpus_per_node": 2 * config.ranks.num_gpus_per_node})]
