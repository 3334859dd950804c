"""Which process runs on which devices in which phase, decided and printed before anything starts.

Each (role, rank) is a process of its own. Colocated roles share the same devices and take turns by phase; otherwise
actor, critic, each reward model and vLLM engines have devices of their own. The reference model lives inside the
actor's processes.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.layouts import LayoutArguments
from megarlhf.config.roles import RoleSpec, megatron_roles, roles_of
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
    addresses: tuple[str, ...]  # of its nodes in Ray; empty texts where no cluster is joined
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


class Node(NamedTuple):
    """One node to place on."""

    gpus: int
    cores: int
    address: str = ""  # of Ray's; empty where no cluster is joined


class Machine(NamedTuple):
    """The nodes to place on, those with the most devices first."""

    kind: DeviceKind
    nodes: tuple[Node, ...]

    @classmethod
    def alike(cls, kind: DeviceKind, nodes: int, gpus_per_node: int, cores_per_node: int) -> "Machine":
        """Of so many equal nodes."""
        return cls(kind, (Node(gpus_per_node, cores_per_node),) * nodes)

    def __str__(self) -> str:
        """For people: each node's devices, where they differ or have addresses."""
        sizes = [f"{node.gpus} GPU(s)" if self.kind == "gpu" else f"{node.cores} core(s)" for node in self.nodes]
        if len(set(sizes)) == 1 and not self.nodes[0].address:
            return f"{len(sizes)} node(s) with {sizes[0]} each"
        named = [f"{node.address}: {size}".removeprefix(": ") for node, size in zip(self.nodes, sizes, strict=True)]
        return f"{len(sizes)} node(s) ({', '.join(named)})"


def asked_nodes(config: PPOConfig, gpus_per_node: int) -> int:
    """Nodes that the options ask for; without GPUs those of the model on most, since there roles share cores."""
    needed = [role.nodes(config)[0] for role in megatron_roles(config)]
    if gpus_per_node:
        on_one = max(1, gpus_per_node // config.cluster.vllm_tensor_parallel_size)  # engines
        needed.append(-(-config.cluster.vllm_num_engines // on_one))
    return max(needed, default=1) if config.cluster.colocate_all_models or not gpus_per_node else sum(needed)


def plan_placement(
    config: PPOConfig, machine: Machine, *, only: Sequence[RoleSpec] | None = None
) -> PlacementPlan:
    """Assign every process of a run, or of these roles alone, to a node and to devices there.

    A model has as many ranks on each of its nodes as its options say, neighbours together: tensor-parallel ranks share
    a node. Models that take turns start at the first node. Disjoint ones take nodes where the fewest GPUs are left that
    are enough; without GPUs those with the fewest ranks. An engine stays on one node, the one with the most room, of
    equal ones the last: exports are written on the first. Engines that take turns with models keep to their devices as
    long as all have room there.

    With GPUs a rank has one, an engine as many as it has ranks. Without, a rank has an equal part of its node's cores:
    among the ranks of its role where roles take turns, among all otherwise. More ranks than cores share them.

    Raises:
        ValueError: too few nodes or GPUs.
    """
    workers: list[Worker] = []
    notes: list[str] = []
    roles = roles_of(config) if only is None else only
    for group in [[role] for role in roles] if config.cluster.colocate_all_models else [roles]:
        placed, note = _place(config, group, machine, workers)
        workers += placed
        notes += note
    addresses = tuple(node.address for node in machine.nodes)
    return PlacementPlan(workers=tuple(workers), device_kind=machine.kind, addresses=addresses, notes=tuple(notes))


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


def _place(
    config: PPOConfig, group: Sequence[RoleSpec], machine: Machine, others: Sequence[Worker]
) -> tuple[list[Worker], list[str]]:
    """Workers that do not take turns with each other but with `others`, and what to tell the user."""
    sizes = [role.devices_per_worker(config) for role in group]
    total = sum(size * role.num_workers(config) for role, size in zip(group, sizes, strict=True))
    room = [node.gpus if machine.kind == "gpu" else total for node in machine.nodes]
    spots = None
    if others and group[0].runs == "vllm":
        spots = _spots(config, group, _shared_room(room, others, machine.kind), machine.kind)
    if spots is None and (spots := _spots(config, group, room, machine.kind)) is None:
        raise ValueError(_too_few(config, group, machine))
    slots = room if machine.kind == "gpu" else [max(slot + size for *_, slot, size in spots)] * len(room)
    workers = []
    for role, rank, node, slot, size in spots:
        num_cores = machine.nodes[node].cores
        threads = max(1, num_cores // slots[node])
        gpus = range(slot, slot + size)
        cores = (core % num_cores for core in range(gpus.start * threads, gpus.stop * threads))
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
    return workers, _notes(group, total, slots, machine)


Spot = tuple[RoleSpec, int, int, int, int]  # role, rank, node, first slot there, and slots


def _spots(config: PPOConfig, group: Sequence[RoleSpec], room: Sequence[int], kind: DeviceKind) -> list[Spot] | None:
    """Where each process goes, of nodes with so many slots; None: no room."""
    left, spots = list(room), list[Spot]()
    for role in group:
        size, free, chosen = role.devices_per_worker(config), list(left), list[int]()
        if role.runs == "vllm":
            for _ in range(role.num_workers(config)):
                node = max(range(len(free)), key=lambda node: (free[node], node))
                free[node] -= size
                chosen.append(node)
            if min(free) < 0:
                return None
        else:
            num_nodes, each = role.nodes(config)
            fitting = [node for node, slots in enumerate(left) if slots >= each]
            sign = 1 if kind == "gpu" and len(group) > 1 else -1
            best = sorted(fitting, key=lambda node: sign * left[node])[:num_nodes]
            if len(best) < num_nodes:
                return None
            chosen = best * each
        for rank, node in enumerate(sorted(chosen)):
            spots.append((role, rank, node, room[node] - left[node], size))
            left[node] -= size
    return spots


def _shared_room(room: Sequence[int], others: Sequence[Worker], kind: DeviceKind) -> list[int]:
    """Slots of GPUs that others have as well; without GPUs all slots of their nodes."""
    held = [{gpu for other in others if other.node == node for gpu in other.devices} for node in range(len(room))]
    return [len(gpus) if kind == "gpu" else slots * bool(gpus) for slots, gpus in zip(room, held, strict=True)]


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
    asked, most, missing = [], 0, ""
    for role in group:
        options = " x ".join(names[0] for names in role.workers)
        devices = f" x {role.devices}={role.devices_per_worker(config)}" if role.devices else ""
        asked.append(f"{options}={role.num_workers(config)}{devices}")
        if role.runs == "megatron" and (nodes := role.nodes(config)[0]) > max(most, len(machine.nodes)):
            most, missing = nodes, f"; {role.workers[0][0]}={nodes}: {nodes - len(machine.nodes)} node(s) are missing"
    rule = "an engine stays on one node" if group[0].runs == "vllm" else "a model has its number on each of its nodes"
    if len(group) > 1:
        rule = "colocate_all_models=False gives each role its own"
    unit = " GPUs" if machine.kind == "gpu" else " ranks"
    return f"{' + '.join(asked)}{unit} do not fit on {machine} ({rule}{missing}): use fewer, or more nodes"


def _notes(group: Sequence[RoleSpec], num_ranks: int, slots: Sequence[int], machine: Machine) -> list[str]:
    names = ", ".join(_shown(role) for role in group)
    fewest = min(node.cores for node in machine.nodes)
    if machine.kind == "cpu" and slots[0] > fewest:
        return [f"{names}: up to {slots[0]} ranks share the {fewest} core(s) of a node"]
    if machine.kind == "gpu" and num_ranks < sum(slots):
        return [f"{names}: {num_ranks} of {sum(slots)} GPUs in use, the others are idle"]
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
