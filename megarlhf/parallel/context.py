"""Context parallelism: which part of a packed sequence each rank of the context group has.

Every segment of a packed sequence that n ranks share is cut into 2n equal chunks, of which rank r has chunks r and
2n - 1 - r: an early and a late one, so that all ranks attend to as much (the order of Megatron-Core and
TransformerEngine).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megarlhf.data.types import MicroBatch


def context_indices(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """Positions of the packed sequence that one of `size` context ranks has, in its order: [t / size] int64."""
    parts = []
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        chunk = (stop - start) // (2 * size)
        firsts = (start + number * chunk for number in (rank, 2 * size - 1 - rank))
        parts += [torch.arange(first, first + chunk, device=cu_seqlens.device) for first in firsts]
    return torch.cat(parts)


def context_part(micro_batch: MicroBatch, rank: int, size: int) -> MicroBatch:
    """One context rank's part of a packed sequence that was packed for `size` of them."""
    if size == 1:
        return micro_batch
    mine = context_indices(micro_batch.cu_seqlens, rank, size)
    per_token = ("tokens", "targets", "position_ids", "target_mask", "row_ids")
    parts: dict[str, Any] = {name: getattr(micro_batch, name)[mine] for name in per_token}
    fields = {name: packed[mine] for name, packed in micro_batch.fields.items()}
    return replace(micro_batch, fields=fields, context_size=size, **parts)


def join_context(parts: Sequence[Tensor], cu_seqlens: Tensor) -> Tensor:
    """The whole packed sequence from every context rank's part, in rank order: the inverse of `context_part`."""
    if len(parts) == 1:
        return parts[0]
    packed = parts[0].new_empty(int(cu_seqlens[-1]), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        packed[context_indices(cu_seqlens, rank, len(parts))] = part
    return packed
