"""Which process runs on which devices in which phase, decided and printed before anything starts.

Each (role, rank) is a process of its own. Colocated roles share the same devices and take turns by phase; otherwise
actor, critic, each reward model and vLLM engines have devices of their own. The reference model lives inside the
actor's processes.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.layouts import LayoutArguments
from megarlhf.config.roles import RoleSpec, roles_of
from megarlhf.parallel.device import DeviceKind

_WORK = ("rollout", "reward", "train")  # phases that compute
# int32 ids and log-probs from the engines; log-probs, KL and values on their way to the driver, advantages and returns
# back: all float32
_BYTES_PER_RESPONSE_TOKEN = 24
_SPARE = 1.25  # of the whole: objects are aligned, and those of the step before go late
_LEAST = 128 << 20


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One process and what it may use; a vLLM engine counts as one, whatever its size."""

    role: RoleSpec
    rank: int  # among the role's processes; the engine's number for "rollout"
    place: str  # Megatron coordinates in the dimensions larger than 1, such as "tp1 pp0"; empty for an engine
    node: int
    devices: tuple[int, ...]  # GPUs, or cores, of the node; each rank of an engine has an equal run of them
    threads: int  # CPU threads it computes with, over all ranks of an engine


@dataclass(frozen=True, kw_only=True)
class PlacementPlan:
    """All workers of a run: those of each role by rank, the engines last."""

    workers: tuple[Worker, ...]
    device_kind: DeviceKind
    notes: tuple[str, ...]  # what is legal but costs speed: shared cores, idle GPUs

    def of(self, role: str) -> tuple[Worker, ...]:
        """The workers of a role, by rank."""
        return tuple(worker for worker in self.workers if worker.role.name == role)

    def table(self) -> str:
        """Aligned text: a header, one line a worker, then the notes."""
        unit = "cores" if self.device_kind == "cpu" else "GPUs"
        rows = [("role", "rank", "node", unit, "threads", "phases")]
        for worker in self.workers:
            rank = f"{worker.rank} ({worker.place})" if worker.place else str(worker.rank)
            row = (_shown(worker.role), rank, str(worker.node), _as_ranges(worker.devices), str(worker.threads))
            rows.append((*row, ", ".join(phase for phase in _WORK if phase in worker.role.awake)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


class Machine(NamedTuple):
    """The nodes to place on, each alike."""

    kind: DeviceKind
    nodes: int
    gpus_per_node: int
    cores_per_node: int


def plan_placement(
    config: PPOConfig, machine: Machine, *, only: Sequence[RoleSpec] | None = None
) -> PlacementPlan:
    """Assign every process of a run, or of these roles alone, to a node and to devices there.

    Processes fill one node after the other, so tensor-parallel ranks, which are neighbours, share a node where they
    can; an engine always stays on one. With GPUs a rank has one, an engine as many as it has ranks. Without, nodes take
    equal numbers of ranks, and a rank has an equal part of its node's cores: among the ranks of its role where roles
    take turns, among all otherwise. More ranks than cores share them.

    Raises:
        ValueError: too few GPUs.
    """
    workers: list[Worker] = []
    notes: list[str] = []
    roles = roles_of(config) if only is None else only
    for group in [[role] for role in roles] if config.cluster.colocate_all_models else [roles]:
        placed, note = _place(config, group, machine)
        workers += placed
        notes += note
    return PlacementPlan(workers=tuple(workers), device_kind=machine.kind, notes=tuple(notes))


def object_store_bytes(config: PPOConfig) -> int:
    """Bytes of one node's store, through which a step's tokens go, where all are as long as they may be."""
    prompts = config.batch.rollout_batch_size
    prompts *= 2 if config.algorithm.dynamic_filtering else 1  # those that are kept, and another round's
    responses = prompts * config.batch.n_samples_per_prompt
    if config.evaluation.eval_data is not None:  # a part of it, when the step's are gone
        responses = max(responses, config.evaluated_prompts * (1 + config.evaluation.eval_n_samples_per_prompt))
    tokens = _BYTES_PER_RESPONSE_TOKEN * responses * config.rollout.generate_max_len
    tokens += 4 * prompts * config.rollout.prompt_max_len
    return max(_LEAST, int(_SPARE * tokens))


def _place(config: PPOConfig, group: Sequence[RoleSpec], machine: Machine) -> tuple[list[Worker], list[str]]:
    """Workers with devices of their own, and what to tell the user."""
    members = [(role, rank) for role in group for rank in range(role.num_workers(config))]
    sizes = [role.devices_per_worker(config) for role, _ in members]
    slots_per_node = machine.gpus_per_node if machine.kind == "gpu" else _slots_needed(sizes, machine.nodes)
    spots = _fill(sizes, machine.nodes, slots_per_node)
    if spots is None:
        raise ValueError(_too_few(config, group, machine))
    threads = max(1, machine.cores_per_node // slots_per_node)
    workers = []
    for (role, rank), size, (node, slot) in zip(members, sizes, spots, strict=True):
        gpus = range(slot, slot + size)
        cores = (core % machine.cores_per_node for core in range(gpus.start * threads, gpus.stop * threads))
        is_model = role.runs == "megatron"
        workers.append(
            Worker(
                role=role,
                rank=rank,
                place=_coordinates(rank, role.num_workers(config), role.layout(config)) if is_model else "",
                node=node,
                devices=tuple(gpus if machine.kind == "gpu" else cores),
                threads=threads * size,
            )
        )
    return workers, _notes(group, sum(sizes), slots_per_node, machine)


def _fill(sizes: Sequence[int], nodes: int, slots_per_node: int) -> list[tuple[int, int]] | None:
    """(node, first slot) of each process when they fill node after node and none spans two; None: no room."""
    spots: list[tuple[int, int]] = []
    node, slot = 0, 0
    for size in sizes:
        if slot + size > slots_per_node:
            node, slot = node + 1, 0
        if node >= nodes or size > slots_per_node:
            return None
        spots.append((node, slot))
        slot += size
    return spots


def _slots_needed(sizes: Sequence[int], nodes: int) -> int:
    """Fewest slots a node must have for all processes to find room; at least 1."""
    fewest = max(1, math.ceil(sum(sizes) / nodes))
    return next(slots for slots in itertools.count(fewest) if _fill(sizes, nodes, slots) is not None)


def _coordinates(rank: int, world_size: int, layout: LayoutArguments) -> str:
    """Place of a rank in Megatron's order tp-cp-dp-pp, the first changing fastest: "tp1 dp0"; only sizes above 1."""
    tp, cp, pp = layout.tensor_model_parallel_size, layout.context_parallel_size, layout.pipeline_model_parallel_size
    parts = []
    for name, size in (("tp", tp), ("cp", cp), ("dp", world_size // (tp * cp * pp)), ("pp", pp)):
        if size > 1:
            parts.append(f"{name}{rank % size}")
            rank //= size
    return " ".join(parts)


def _too_few(config: PPOConfig, group: Sequence[RoleSpec], machine: Machine) -> str:
    asked = []
    for role in group:
        options = " x ".join(names[0] for names in role.workers)
        devices = f" x {role.devices}={role.devices_per_worker(config)}" if role.devices else ""
        asked.append(f"{options}={role.num_workers(config)}{devices}")
    rule = "an engine stays on one node" if len(group) == 1 else "colocate_all_models=False gives each role its own"
    there = f"{machine.nodes} node(s) with {machine.gpus_per_node} GPU(s) each"
    return f"{' + '.join(asked)} GPUs do not fit on {there} ({rule}): use fewer, or more nodes"


def _notes(group: Sequence[RoleSpec], num_ranks: int, slots_per_node: int, machine: Machine) -> list[str]:
    names = ", ".join(_shown(role) for role in group)
    num_slots = machine.nodes * slots_per_node
    if machine.kind == "cpu" and slots_per_node > machine.cores_per_node:
        return [f"{names}: up to {slots_per_node} ranks share the {machine.cores_per_node} core(s) of a node"]
    if machine.kind == "gpu" and num_ranks < num_slots:
        return [f"{names}: {num_ranks} of {num_slots} GPUs in use, the others are idle"]
    return []


def _as_ranges(numbers: Sequence[int]) -> str:
    """Numbers as text, runs shortened: (0, 1, 2, 5) is "0-2,5"."""
    parts: list[str] = []
    for _, run in itertools.groupby(enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        parts.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(parts)


def _shown(role: RoleSpec) -> str:
    return f"{role.name}+reference" if role.has_reference else role.name
