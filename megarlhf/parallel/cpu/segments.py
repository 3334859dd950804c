"""Which tokens of a packed micro-batch attend to which: blocks of neighbouring segments, with their masks."""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megarlhf.parallel.context import context_indices

_BLOCK_TOKENS = 256  # short segments share one masked product up to this many queries


@dataclass(frozen=True, kw_only=True)
class AttentionBlock:
    """Neighbouring segments computed in one product.

    Under context parallelism `start` and `stop` bound this rank's part of the segments, which is as long and lies in
    the same place on every rank of the group.
    """

    start: int  # first query
    stop: int  # past the last query
    prefix: tuple[int, int] | None  # keys of the shared prompt, seen whole
    mask: Tensor | None  # [queries, keys] bool, True where a query sees a key; None: plain causal
    query_positions: Tensor  # [queries] int64, counted alike for queries and keys of one segment
    key_positions: Tensor  # [keys] int64
    # keys: the prefix and the block's own tokens; under context parallelism the block's part on each rank in turn

    def visible(self, window: int | None) -> Tensor | None:
        """The mask of a layer whose tokens see themselves and the `window` - 1 tokens before; None: no such limit."""
        if window is None:
            return self.mask
        distance = self.query_positions[:, None] - self.key_positions
        return (distance < window) & (distance >= 0 if self.mask is None else self.mask)


@dataclass
class SegmentParams(PackedSeqParams):
    """Packed parameters that name each token's position and each segment's shared prompt."""

    position_ids: Tensor | None = None  # [t] int64
    blocks: tuple[AttentionBlock, ...] = ()
    _masks: dict[int | None, list[Tensor | None]] = field(default_factory=dict)

    def masks(self, window: int | None) -> list[Tensor | None]:
        """Each block's mask for layers with this window, worked out once for all of them."""
        if window not in self._masks:
            self._masks[window] = [block.visible(window) for block in self.blocks]
        return self._masks[window]


def attention_blocks(
    cu_seqlens: list[int], prefix_segments: tuple[int | None, ...], position_ids: Tensor
) -> tuple[AttentionBlock, ...]:
    """Group neighbouring segments that continue the same prompt into blocks of about _BLOCK_TOKENS queries."""
    blocks: list[AttentionBlock] = []
    members: list[int] = []

    def close() -> None:
        if members:
            blocks.append(_block(cu_seqlens, members, prefix_segments[members[0]], position_ids))
            members.clear()

    for segment, prefix in enumerate(prefix_segments):
        if members:
            tokens = cu_seqlens[segment + 1] - cu_seqlens[members[0]]
            if prefix != prefix_segments[members[0]] or tokens > _BLOCK_TOKENS:
                close()
        members.append(segment)
    close()
    return tuple(blocks)


def _block(
    cu_seqlens: list[int], members: list[int], prefix_segment: int | None, position_ids: Tensor
) -> AttentionBlock:
    start, stop = cu_seqlens[members[0]], cu_seqlens[members[-1] + 1]
    prefix = None if prefix_segment is None else (cu_seqlens[prefix_segment], cu_seqlens[prefix_segment + 1])
    positions, mask = position_ids[start:stop], None
    if prefix is not None or len(members) > 1:
        device = position_ids.device
        owner = torch.cat([torch.full((cu_seqlens[m + 1] - cu_seqlens[m],), m, device=device) for m in members])
        mask = (owner[:, None] == owner[None, :]).tril()
    if prefix is None:
        return AttentionBlock(
            start=start, stop=stop, prefix=None, mask=mask, query_positions=positions, key_positions=positions
        )
    assert mask is not None
    return AttentionBlock(
        start=start,
        stop=stop,
        prefix=prefix,
        mask=torch.cat([mask.new_ones(stop - start, prefix[1] - prefix[0]), mask], dim=1),
        query_positions=positions,
        key_positions=torch.cat([position_ids[slice(*prefix)], positions]),
    )


def context_blocks(cu_seqlens: Tensor, rank: int, size: int) -> tuple[AttentionBlock, ...]:
    """The blocks of one context rank: segments together up to _BLOCK_TOKENS, masks from places in the sequence."""
    bounds = cu_seqlens.tolist()
    groups: list[tuple[int, int]] = []  # first and past the last segment
    for segment in range(len(bounds) - 1):
        if groups and bounds[segment + 1] - bounds[groups[-1][0]] <= _BLOCK_TOKENS:
            groups[-1] = (groups[-1][0], segment + 1)
        else:
            groups.append((segment, segment + 1))
    blocks = []
    for first, last in groups:
        inside = cu_seqlens[first : last + 1] - cu_seqlens[first]
        segments = torch.arange(last - first, device=inside.device)
        owner = torch.repeat_interleave(segments, (inside[1:] - inside[:-1]).long())
        places = [context_indices(inside, r, size) for r in range(size)]
        queries, keys = places[rank], torch.cat(places)
        mask = (owner[queries][:, None] == owner[keys]) & (queries[:, None] >= keys)
        blocks.append(
            AttentionBlock(
                start=bounds[first] // size,
                stop=bounds[last] // size,
                prefix=None,
                mask=mask,
                query_positions=queries,
                key_positions=keys,
            )
        )
    return tuple(blocks)
