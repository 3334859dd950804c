"""The rehearsal of rehearse.py, whose configuration is checked already."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.lora import LoraArguments
from megarlhf.config.roles import RoleSpec, megatron_roles, roles_of
from megarlhf.engine.rehearsal import Rehearsal, rehearse_model
from megarlhf.formats.buckets import Bucket, plan_buckets, senders_of
from megarlhf.formats.huggingface import read_config
from megarlhf.models.build import ModelOptions
from megarlhf.models.registry import find_architecture
from megarlhf.parallel.device import num_cores
from megarlhf.planner.placement import Machine, PlacementPlan, Worker, asked_nodes, plan_placement
from megarlhf.planner.transport import Transport, plan_transport
from megarlhf.trainers.assembly import parallel_sizes

FILE = "rehearsal.jsonl"


def run(config: PPOConfig, *, dry_run: bool) -> int:
    """Rehearse, print a summary, and write a line for each process; returns the exit status."""
    started = time.monotonic()
    plan = plan_placement(config, asked_machine(config))
    check_devices(plan, colocated=config.cluster.colocate_all_models)
    models = {role.name: _rehearsed(config, role) for role in megatron_roles(config)}
    sync = weight_plan(config, plan, models["actor"])
    lines = [line for role in roles_of(config) for line in summary(plan, role, models.get(role.name), config)]
    print("\n".join([*lines, *sync.lines()]))
    if not dry_run:
        file = Path(config.logging.save) / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        rehearsed = processes(plan, models, sync, bf16=config.model.bf16)
        with file.open("w") as out:
            out.writelines(json.dumps(process) + "\n" for process in rehearsed)
        print(f"a line for each process: {file}")
    print(f"{len(plan.workers)} processes rehearsed in {time.monotonic() - started:.1f} s")
    return 0


def asked_machine(config: PPOConfig) -> Machine:
    """Nodes with as many GPUs as the options ask for on one; roles that take turns share them."""
    per_node = max(role.nodes(config)[1] for role in megatron_roles(config))
    return Machine.alike("gpu", asked_nodes(config, per_node), per_node, num_cores())


def _rehearsed(config: PPOConfig, role: RoleSpec) -> Rehearsal:
    hf, layout = read_config(role.start(config)[1]), role.layout(config)
    options = ModelOptions(bf16=config.model.bf16, layout=layout, lora=LoraArguments())
    return rehearse_model(
        find_architecture(hf),
        hf,
        parallel_sizes(layout),
        options,
        head=role.head,
        world_size=role.num_workers(config),
    )


def check_devices(plan: PlacementPlan, *, colocated: bool) -> None:
    """Raises RuntimeError where two ranks that do not take turns have the same device."""
    taken: dict[tuple[str, int, int], Worker] = {}
    for worker in plan.workers:
        for device in worker.devices:
            place = (worker.role.name if colocated else "", worker.node, device)
            if (other := taken.setdefault(place, worker)) is not worker:
                names = " and ".join(f"{w.role.name} {w.rank}" for w in (other, worker))
                raise RuntimeError(f"{names} have device {device} of node {worker.node}")


class WeightPlan(NamedTuple):
    """How new weights get to the engines."""

    transport: Transport
    senders: list[int]  # ranks of the actor that take part; buckets name them by their places here
    buckets: list[Bucket]  # empty where engines read in the memory of a host

    def lines(self) -> Iterator[str]:
        """For people."""
        yield self.transport.line()
        if self.buckets:
            largest = max(bucket.num_bytes for bucket in self.buckets) / 2**20
            number = len({bucket.sender for bucket in self.buckets})
            yield f"  {len(self.buckets)} buckets of at most {largest:.1f} MiB, from {number} ranks"


def weight_plan(config: PPOConfig, plan: PlacementPlan, model: Rehearsal) -> WeightPlan:
    """As cluster/weight_sync.py makes it.

    Raises:
        ValueError: there is no way from these ranks to these engines.
    """
    transport = plan_transport(config, plan)
    if transport.name == "shared_memory":
        return WeightPlan(transport, [], [])
    senders = senders_of(model.sent, by_handle=transport.name == "ipc")
    most = config.cluster.update_weight_buffer_mib * 2**20
    return WeightPlan(transport, senders, plan_buckets([model.sent[rank] for rank in senders], most_bytes=most))


def summary(plan: PlacementPlan, role: RoleSpec, model: Rehearsal | None, config: PPOConfig) -> Iterator[str]:
    """What is said of a role."""
    workers = plan.of(role.name)
    nodes = {worker.node for worker in workers}
    yield f"{role.name}: {len(workers)} processes on {len(nodes)} node(s)"
    if model is None:
        return
    yield f"  meet at node {workers[0].node}"
    for kind, groups in model.groups.items():
        inside = all(len({workers[rank].node for rank in group}) == 1 for group in groups)
        yield f"  {kind}: {len(groups)} of {len(groups[0])}, {'each inside a node' if inside else 'across nodes'}"
    if role.name == "actor":
        sent = [sum(_bytes(piece.size, bf16=config.model.bf16) for piece in pieces) for pieces in model.exported]
        yield (
            f"  weights: {len(model.shapes)} tensors, {sum(sent) / 1e9:.2f} GB, each number handed out once, by "
            f"{sum(size > 0 for size in sent)} ranks, of which each has at most {max(sent) / 1e6:.1f} MB"
        )


def processes(
    plan: PlacementPlan, models: Mapping[str, Rehearsal], sync: WeightPlan, *, bf16: bool
) -> Iterator[dict[str, Any]]:
    """Each process: where it runs, whom it meets, its groups, and the parts of weights that it hands out."""
    buckets: dict[int, list[dict[str, int]]] = {rank: [] for rank in sync.senders}
    for number, bucket in enumerate(sync.buckets):
        buckets[sync.senders[bucket.sender]].append({"number": number, "bytes": bucket.num_bytes})
    members: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
    for name, model in models.items():
        for kind, groups in model.groups.items():
            for group in groups:
                for rank in group:
                    members.setdefault(name, {}).setdefault(rank, {})[kind] = group
    for worker in plan.workers:
        name, rank = worker.role.name, worker.rank
        process = {"role": name, "rank": rank, "place": worker.place, "node": worker.node, "devices": worker.devices}
        if name in models:
            process |= {"meets_at_node": plan.of(name)[0].node, "groups": members[name][rank]}
        if name == "actor":
            process["sends"] = [
                {
                    "tensor": piece.name,
                    "part": [[part.start, part.stop] for part in piece.index],
                    "bytes": _bytes(piece.size, bf16=bf16),
                }
                for piece in models[name].exported[rank]
            ]
            process["buckets"] = buckets.get(rank, [])
        if sync.buckets and (name == "rollout" or (name == "actor" and rank in buckets)):
            process["weights_meet_at_node"] = plan.of("actor")[sync.senders[0]].node
        yield process


def _bytes(size: tuple[int, ...], *, bf16: bool) -> int:
    return math.prod(size) * (2 if bf16 else 4)
