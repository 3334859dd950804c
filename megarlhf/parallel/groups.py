"""Process groups of one role: torch.distributed and Megatron-Core's parallel state, set up once per process.

`fake_world` sets up one of many ranks in this process alone, to ask Megatron-Core what each of them would hold.
"""

import gc
import logging
import os
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megarlhf.parallel.cpu import megatron_cpu
from megarlhf.parallel.device import device_kind
from megarlhf.parallel.megatron_versions import balance_losses
from megarlhf.parallel.weight_group import Meeting, store_at

Value = TypeVar("Value")
_logger = logging.getLogger(__name__)
_left: list[weakref.ref[dist.ProcessGroup]] = []  # groups of worlds that this process has left


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """How one model is cut: sizes of the tensor, pipeline, context and expert groups.

    Data parallelism is what remains of the world. Experts are cut by groups of their own (expert x expert-tensor), laid
    over the tensor, context and data ranks of a pipeline stage.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None  # None: as tensor
    virtual: int = 1  # chunks of layers on each pipeline rank; above 1 the interleaved schedule runs

    @property
    def model(self) -> int:
        """Ranks that hold one replica of the dense weights, context ranks included."""
        return self.tensor * self.pipeline * self.context

    def data(self, world_size: int) -> int:
        """Data-parallel size of a world.

        Raises:
            ValueError: the world is not a multiple of tensor x pipeline x context, or of the experts' groups.
        """
        pipeline, expert_tensor = f"pipeline_model_parallel_size={self.pipeline}", self.expert_tensor or self.tensor
        if world_size % self.model:
            raise ValueError(
                f"world_size={world_size}; must be a multiple of tensor_model_parallel_size={self.tensor} x "
                f"{pipeline} x context_parallel_size={self.context} = {self.model}"
            )
        if world_size % (experts := self.expert * expert_tensor * self.pipeline):
            raise ValueError(
                f"world_size={world_size}; must be a multiple of expert_model_parallel_size={self.expert} x "
                f"expert_tensor_parallel_size={expert_tensor} x {pipeline} = {experts}"
            )
        return world_size // self.model


def initialize_groups(
    sizes: ParallelSizes,
    *,
    rank: int,
    world_size: int,
    init_method: str | Meeting,
    seed: int,
    local_rank: int = 0,
    timeout_minutes: float = 10.0,
) -> None:
    """Join the role's world, cut it into Megatron-Core's groups and seed the generators.

    Args:
        init_method: torch.distributed rendezvous, such as "file:///tmp/rendezvous" or "env://"; or a store.
        timeout_minutes: a collective that waits longer fails on every rank.
    """
    sizes.data(world_size)
    _collect_left_groups()
    megatron_cpu.verify()
    on_gpu = device_kind() == "gpu"
    if on_gpu:
        torch.cuda.set_device(local_rank)
    timeout = timedelta(minutes=timeout_minutes)
    place = init_method if isinstance(init_method, str) else init_method.host
    if place.startswith("file:") or "127.0.0.1" in place:  # all ranks on this machine
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=init_method if isinstance(init_method, str) else None,
        store=None if isinstance(init_method, str) else store_at(init_method, timeout),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    _cut_world(sizes, gloo=True, timeout_minutes=timeout_minutes)
    seed_generators(seed)


def seed_generators(seed: int) -> None:
    """Seed PyTorch's generator, alike on all ranks of a model, and Megatron-Core's, which differ between its parts."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)


def separate_generators() -> AbstractContextManager[None]:
    """Inside the block random numbers on a device differ between the tensor-parallel ranks of a model."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    forked: AbstractContextManager[None] = get_cuda_rng_tracker().fork()
    return forked


def _cut_world(sizes: ParallelSizes, *, gloo: bool, timeout_minutes: float = 30.0) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        sizes.tensor,
        sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual if sizes.virtual > 1 else None,
        context_parallel_size=sizes.context,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
        create_gloo_process_groups=gloo,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )


def all_gather_objects(mine: Value) -> list[Value]:
    """Every rank's object, by rank. All call it, and none returns before all have."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts


def destroy_groups() -> None:
    """Leave every group, so that the process may set up another world.

    A gloo group has threads and sockets as long as anything refers to it: they end with the last model that was built
    in this world, so drop it too.
    """
    from megatron.core import parallel_state

    if dist.is_initialized():
        _left.extend(weakref.ref(group) for group in dist.distributed_c10d._world.pg_map)
    parallel_state.destroy_model_parallel()
    for name, value in vars(parallel_state).items():  # which Megatron-Core remembers all the same
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)
    balance_losses().clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _collect_left_groups() -> None:
    """End the groups of earlier worlds that only garbage refers to: the collector looks at what is old rarely."""
    if any(group() is not None for group in _left):
        gc.unfreeze()  # the models of a world that was left are garbage, frozen or not
        gc.collect()
    _left[:] = [group for group in _left if group() is not None]
    if _left:
        _logger.warning("%d process groups of worlds that were left are still in use by their engines", len(_left))


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place in each group."""

    world_rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    replica_rank: int  # among the ranks with the same dense weights: data x context
    replica_size: int
    ep_rank: int
    ep_size: int
    etp_rank: int
    etp_size: int
    expert_replica_rank: int  # among the ranks with the same experts' weights
    expert_replica_size: int
    vpp_size: int  # chunks of layers on this rank

    @property
    def is_first_stage(self) -> bool:
        """True where the embedding lives."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where logits, values and losses come out."""
        return self.pp_rank == self.pp_size - 1

    @property
    def holds_results(self) -> bool:
        """True on the one rank per data-parallel replica that reports outputs."""
        return self.computes_results and self.cp_rank == 0

    @property
    def computes_results(self) -> bool:
        """True on one rank per part of each sequence: the ranks whose sums make up the whole batch's."""
        return self.is_last_stage and self.tp_rank == 0


_NAMES = {  # of a place among Ranks -> of its groups in Megatron-Core
    "tp": "TENSOR_MODEL_PARALLEL_GROUP",
    "pp": "PIPELINE_MODEL_PARALLEL_GROUP",
    "dp": "DATA_PARALLEL_GROUP",
    "cp": "CONTEXT_PARALLEL_GROUP",
    "replica": "DATA_PARALLEL_GROUP_WITH_CP",
    "ep": "EXPERT_MODEL_PARALLEL_GROUP",
    "etp": "EXPERT_TENSOR_PARALLEL_GROUP",
    "expert_replica": "EXPERT_DATA_PARALLEL_GROUP",
}


def current_ranks() -> Ranks:
    """This process's ranks, from Megatron-Core's parallel state."""
    from megatron.core import parallel_state as mpu

    groups = {
        "tp": mpu.get_tensor_model_parallel_group(),
        "pp": mpu.get_pipeline_model_parallel_group(),
        "dp": mpu.get_data_parallel_group(),
        "cp": mpu.get_context_parallel_group(),
        "replica": mpu.get_data_parallel_group(with_context_parallel=True),
        "ep": mpu.get_expert_model_parallel_group(),
        "etp": mpu.get_expert_tensor_parallel_group(),
        "expert_replica": mpu.get_expert_data_parallel_group(),
    }
    return Ranks(
        world_rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        vpp_size=mpu.get_virtual_pipeline_model_parallel_world_size() or 1,
        **{f"{name}_rank": group.rank() for name, group in groups.items()},
        **{f"{name}_size": group.size() for name, group in groups.items()},
    )


@contextmanager
def fake_world(sizes: ParallelSizes, *, rank: int, world_size: int) -> Iterator[Ranks]:
    """This process as one rank; tensors made inside the block have shapes and no numbers.

    Collectives return at once without doing anything.

    Raises:
        ValueError: the world is not a multiple of the groups' sizes.
        RuntimeError: this process has joined a real world.
    """
    sizes.data(world_size)
    if dist.is_initialized():
        raise RuntimeError("a fake world needs a process that has joined no other")
    megatron_cpu.verify()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        _cut_world(sizes, gloo=False)
        with FakeTensorMode():
            yield current_ranks()
    finally:
        destroy_groups()


def world_groups(sizes: ParallelSizes, *, world_size: int) -> dict[str, list[tuple[int, ...]]]:
    """The ranks of every group that Megatron-Core makes in a world, by the kind's name there.

    Raises:
        ValueError, RuntimeError: as in fake_world.
    """
    from megatron.core import parallel_state

    found: dict[str, list[tuple[int, ...]]] = {}
    create = parallel_state.create_group

    def noted(ranks: list[int], *rest: Any, group_desc: str, **options: Any) -> Any:
        found.setdefault(group_desc, []).append(tuple(ranks))
        return create(ranks, *rest, group_desc=group_desc, **options)

    parallel_state.create_group = noted
    try:
        with fake_world(sizes, rank=0, world_size=world_size):
            return found
    finally:
        parallel_state.create_group = create


def world_ranks(groups: dict[str, list[tuple[int, ...]]], sizes: ParallelSizes) -> list[Ranks]:
    """Every rank's places in the groups of its world, by rank."""
    places: dict[int, dict[str, int]] = {}
    for short, name in _NAMES.items():
        for group in groups[name]:
            for place, rank in enumerate(group):
                places.setdefault(rank, {}).update({f"{short}_rank": place, f"{short}_size": len(group)})
    return [
        Ranks(world_rank=rank, world_size=len(places), vpp_size=sizes.virtual, **places[rank])
        for rank in sorted(places)
    ]
