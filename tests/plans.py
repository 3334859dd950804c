"""A model's work on one rank that is not cut, for tests of the memory plan."""

from megarlhf.planner.memory import Work

WORK = Work(
    bf16=True,
    tensor=1,
    pipeline=1,
    virtual=1,
    expert_tensor=1,
    sequence_parallel=False,
    replicas=1,
    expert_replicas=1,
    distributed_optimizer=False,
    recompute=None,
    recompute_method=None,
    recompute_num_layers=None,
    tokens=1000,
    micro_batches=64,
    vocabulary=0,
    logprob_chunk_tokens=2048,
    has_reference=False,
)
