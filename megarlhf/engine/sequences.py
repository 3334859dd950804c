"""Sums over whole sequences, for losses that compare sequences and not tokens."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megarlhf.data.types import MicroBatch


def sequence_sums(values: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Sum of per-token values over the targets that each row's loss looks at, wherever their tokens lie.

    Where context ranks share the packed sequence, the first of them gets the sums and the others none, so that a loss
    over rows counts each row once; the gradient reaches the tokens of all. Every context rank calls it, and lets its
    result take part in the loss.

    Args:
        values: [t] float, of this rank's part of the packed sequence.
    Returns:
        Row numbers [r] int64, as in batch.row_ids, and sums [r] float32; empty on other context ranks than the first.
    """
    rows = torch.from_numpy(batch.places.rows).to(values.device)
    if not len(rows):
        return rows, values.float().sum()[None][:0]
    order = rows.argsort()
    mask = batch.target_mask
    slots = order[torch.searchsorted(rows[order], batch.row_ids[mask])]
    sums = values.new_zeros(len(rows), dtype=torch.float32).index_add(0, slots, values[mask].float())
    if batch.context_size == 1:
        return rows, sums
    group = parallel_state.get_context_parallel_group()
    whole = _SumOnFirstRank.apply(sums, group)
    return rows[: len(whole)], whole


class _SumOnFirstRank(torch.autograd.Function):
    """Forward: the sum over the group on its first rank, nothing elsewhere. Backward: the first rank's gradient."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.count = group, len(sums)
        whole = sums.clone()
        dist.all_reduce(whole, group=group)
        return whole if group.rank() == 0 else whole[:0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        whole = grad.contiguous() if ctx.group.rank() == 0 else grad.new_empty(ctx.count)
        dist.broadcast(whole, dist.get_global_rank(ctx.group, 0), group=ctx.group)
        return whole, None
