"""A world of many ranks that exists in this process alone, to ask Megatron-Core what each of them would hold."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megarlhf.parallel.cpu import megatron_cpu
from megarlhf.parallel.groups import ParallelSizes, Ranks, current_ranks, destroy_groups


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
    from megatron.core import parallel_state

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            sizes.tensor,
            sizes.pipeline,
            expert_model_parallel_size=sizes.expert,
            expert_tensor_parallel_size=sizes.expert_tensor,
            create_gloo_process_groups=False,
        )
        with FakeTensorMode():
            yield current_ranks()
    finally:
        destroy_groups()
