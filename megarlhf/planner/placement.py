"""Which process runs on which devices in which phase, decided and printed before anything starts.

Each (role, rank) is a process of its own. Colocated roles share the same devices and take turns by phase; otherwise
actor, critic and vLLM engines have devices of their own. The reference model lives inside the actor's processes.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Role = Literal["actor", "critic", "rollout"]
Phase = Literal["rollout", "train"]
DeviceKind = Literal["cpu", "gpu"]

_SHOWN: dict[Role, str] = {"actor": "actor+reference", "critic": "critic", "rollout": "rollout"}
_PHASES: dict[Role, tuple[Phase, ...]] = {"actor": ("train",), "critic": ("train",), "rollout": ("rollout",)}


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One process and what it may use; a vLLM engine counts as one, whatever its size."""

    role: Role
    rank: int  # among the role's processes; the engine's number for "rollout"
    place: str  # Megatron coordinates in the dimensions larger than 1, such as "tp1 pp0"; empty for an engine
    node: int
    devices: tuple[int, ...]  # GPUs, or cores, of the node; each rank of an engine has an equal run of them
    threads: int  # CPU threads it computes with, over all ranks of an engine
    phases: tuple[Phase, ...]  # when it works


@dataclass(frozen=True, kw_only=True)
class PlacementPlan:
    """All workers of a run: the actor's ranks, then the critic's, then the engines."""

    workers: tuple[Worker, ...]
    device_kind: DeviceKind
    notes: tuple[str, ...]  # what is legal but costs speed: shared cores, idle GPUs

    def of(self, role: Role) -> tuple[Worker, ...]:
        """The workers of a role, by rank."""
        return tuple(worker for worker in self.workers if worker.role == role)

    def table(self) -> str:
        """Aligned text: a header, one line a worker, then the notes."""
        unit = "cores" if self.device_kind == "cpu" else "GPUs"
        rows = [("role", "rank", "node", unit, "threads", "phases")]
        for worker in self.workers:
            rank = f"{worker.rank} ({worker.place})" if worker.place else str(worker.rank)
            row = (_SHOWN[worker.role], rank, str(worker.node), _as_ranges(worker.devices), str(worker.threads))
            rows.append((*row, ", ".join(worker.phases)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


class ModelSizes(NamedTuple):
    """How one model is cut, in the order in which Megatron numbers ranks (data parallelism lies before pipeline)."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1


def plan_placement(
    *,
    actor_world_size: int,
    critic_world_size: int | None,
    nodes: int,
    gpus_per_node: int,
    num_engines: int,
    engine_tp: int,
    colocate: bool,
    devices: DeviceKind,
    cores_per_node: int,
    actor_model: ModelSizes | None = None,
    critic_model: ModelSizes | None = None,
) -> PlacementPlan:
    """Assign every process of a run to a node and to devices there.

    Processes fill one node after the other, so tensor-parallel ranks, which are neighbours, share a node where they
    can; an engine always stays on one. With GPUs a rank has one, an engine `engine_tp`. Without, nodes take equal
    numbers of ranks, and a rank has an equal part of its node's cores: among the ranks of its role where roles take
    turns, among all otherwise. More ranks than cores share them.

    Args:
        actor_world_size: actor ranks.
        critic_world_size: critic ranks; None where there is no critic.
        nodes: machines of the run.
        gpus_per_node: GPUs on each; has no effect on "cpu".
        num_engines: vLLM engines.
        engine_tp: ranks of each engine.
        colocate: roles share devices and take turns.
        devices: what computes.
        cores_per_node: CPU cores of each node.
        actor_model, critic_model: how each is laid out, for the coordinates of its ranks; None: not cut.
    Raises:
        ValueError: a size below 1, or too few GPUs.
    """
    machine = Machine(devices, nodes, gpus_per_node, cores_per_node)
    requests = [_Request("actor", actor_world_size, 1, actor_model)]
    if critic_world_size is not None:
        requests.append(_Request("critic", critic_world_size, 1, critic_model))
    requests.append(_Request("rollout", num_engines, engine_tp, None))
    sizes = {f"number of {r.role} workers": r.num_workers for r in requests}
    for name, size in {"nodes": nodes, "cores_per_node": cores_per_node, "engine_tp": engine_tp, **sizes}.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    workers: list[Worker] = []
    notes: list[str] = []
    for group in [[request] for request in requests] if colocate else [requests]:
        placed, note = _place(group, machine)
        workers += placed
        notes += note
    return PlacementPlan(workers=tuple(workers), device_kind=devices, notes=tuple(notes))


class Machine(NamedTuple):
    """The nodes to place on, each alike."""

    kind: DeviceKind
    nodes: int
    gpus_per_node: int
    cores_per_node: int


class _Request(NamedTuple):
    """A role's processes: how many, and ranks inside each."""

    role: Role
    num_workers: int
    size: int
    model: ModelSizes | None


def _place(group: Sequence[_Request], machine: Machine) -> tuple[list[Worker], list[str]]:
    """Workers with devices of their own, and what to tell the user."""
    members = [(request, rank) for request in group for rank in range(request.num_workers)]
    sizes = [request.size for request, _ in members]
    slots_per_node = machine.gpus_per_node if machine.kind == "gpu" else _slots_needed(sizes, machine.nodes)
    spots = _fill(sizes, machine.nodes, slots_per_node)
    if spots is None:
        raise ValueError(_too_few(group, machine))
    threads = max(1, machine.cores_per_node // slots_per_node)
    workers = []
    for (request, rank), (node, slot) in zip(members, spots, strict=True):
        gpus = range(slot, slot + request.size)
        cores = (core % machine.cores_per_node for core in range(gpus.start * threads, gpus.stop * threads))
        workers.append(
            Worker(
                role=request.role,
                rank=rank,
                place="" if request.model is None else _coordinates(rank, request.num_workers, *request.model),
                node=node,
                devices=tuple(gpus if machine.kind == "gpu" else cores),
                threads=threads * request.size,
                phases=_PHASES[request.role],
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


def _coordinates(rank: int, world_size: int, tp: int, cp: int, pp: int) -> str:
    """Place of a rank in Megatron's order tp-cp-dp-pp, the first changing fastest: "tp1 dp0"; only sizes above 1."""
    parts = []
    for name, size in (("tp", tp), ("cp", cp), ("dp", world_size // (tp * cp * pp)), ("pp", pp)):
        if size > 1:
            parts.append(f"{name}{rank % size}")
            rank //= size
    return " ".join(parts)


def _too_few(group: Sequence[_Request], machine: Machine) -> str:
    options: dict[Role, str] = {
        "actor": "actor_num_nodes x actor_num_gpus_per_node={}",
        "critic": "critic_num_nodes x critic_num_gpus_per_node={}",
        "rollout": "vllm_num_engines={} x vllm_tensor_parallel_size={}",
    }
    asked = " + ".join(options[request.role].format(request.num_workers, request.size) for request in group)
    rule = "an engine stays on one node" if len(group) == 1 else "colocate_all_models=False gives each role its own"
    there = f"{machine.nodes} node(s) with {machine.gpus_per_node} GPU(s) each"
    return f"{asked} GPUs do not fit on {there} ({rule}): use fewer, or more nodes"


def _notes(group: Sequence[_Request], num_ranks: int, slots_per_node: int, machine: Machine) -> list[str]:
    names = ", ".join(_SHOWN[request.role] for request in group)
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
