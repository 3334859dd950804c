"""Sums over whole sequences, for losses that compare sequences and not tokens."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed.nn.functional import reduce

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
    whole = reduce(sums, dist.get_global_rank(group, 0), group=group)
    return (rows, whole) if group.rank() == 0 else (rows[:0], whole[:0])
