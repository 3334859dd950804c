"""Which tokens of a packed micro-batch attend to which: blocks of neighbouring segments, with their masks."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megarlhf.parallel.context import context_indices

_BLOCK_TOKENS = 128  # short segments share one masked product up to this many queries


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

    def key_spans(self, tokens: int, size: int) -> list[tuple[int, int]]:
        """Where the keys lie in those of `size` context ranks with `tokens` each."""
        own = [(rank * tokens + self.start, rank * tokens + self.stop) for rank in range(size)]
        return own if self.prefix is None else [self.prefix, *own]

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


def _groups(bounds: list[int], prefix_segments: Sequence[int | None]) -> list[tuple[int, int, int | None]]:
    """First and past the last segment of each block, and the prompt before it that its segments continue.

    Neighbours share a block of up to _BLOCK_TOKENS queries. A prompt and those that continue it lie in one where they
    fit, and then none lies before it.
    """
    prompts = [segment for segment, prefix in enumerate(prefix_segments) if prefix is None]
    groups: list[tuple[int, int, int | None]] = []

    def add(first: int, end: int, prompt: int | None) -> None:
        if groups and groups[-1][2] == prompt and bounds[end] - bounds[groups[-1][0]] <= _BLOCK_TOKENS:
            first = groups.pop()[0]
        groups.append((first, end, prompt))

    for head, end in itertools.pairwise([*prompts, len(prefix_segments)]):
        if bounds[end] - bounds[head] <= _BLOCK_TOKENS:
            add(head, end, None)
        else:
            add(head, head + 1, None)
            for segment in range(head + 1, end):
                add(segment, segment + 1, head)
    return groups


def attention_blocks(
    cu_seqlens: Tensor, prefix_segments: Sequence[int | None], position_ids: Tensor
) -> tuple[AttentionBlock, ...]:
    """The blocks of a whole packed sequence.

    Args:
        prefix_segments: of each segment, the one before it that holds the prompt which it continues, if any.
    """
    bounds, blocks = cu_seqlens.tolist(), []
    prefixes = torch.tensor([-1 if prefix is None else prefix for prefix in prefix_segments], device=cu_seqlens.device)
    owners = _owners(cu_seqlens)
    for first, end, prompt in _groups(bounds, prefix_segments):
        start, stop = bounds[first], bounds[end]
        prefix = None if prompt is None else (bounds[prompt], bounds[prompt + 1])
        queries = torch.arange(start, stop, device=cu_seqlens.device)
        keys = queries if prefix is None else torch.cat([torch.arange(*prefix, device=cu_seqlens.device), queries])
        mask = None
        if prefix is not None or end - first > 1:
            owner = owners[queries, None]
            mask = ((owner == owners[keys]) & (queries[:, None] >= keys)) | (prefixes[owner] == owners[keys])
        positions = {"query_positions": position_ids[queries], "key_positions": position_ids[keys]}
        blocks.append(AttentionBlock(start=start, stop=stop, prefix=prefix, mask=mask, **positions))
    return tuple(blocks)


def _owners(bounds: Tensor) -> Tensor:
    """[tokens]: the segment of each, counted from 0."""
    return torch.repeat_interleave((bounds[1:] - bounds[:-1]).long())


def context_blocks(cu_seqlens: Tensor, rank: int, size: int) -> tuple[AttentionBlock, ...]:
    """The blocks of one context rank, with masks from places in the sequence."""
    bounds, blocks = cu_seqlens.tolist(), []
    for first, last, _ in _groups(bounds, [None] * (len(bounds) - 1)):
        inside = cu_seqlens[first : last + 1] - cu_seqlens[first]
        owner = _owners(inside)
        places = [context_indices(inside, r, size) for r in range(size)]
        queries, keys = places[rank], torch.cat(places)
        start, stop = bounds[first] // size, bounds[last] // size
        mask = (owner[queries][:, None] == owner[keys]) & (queries[:, None] >= keys)
        positions = {"query_positions": queries, "key_positions": keys}
        blocks.append(AttentionBlock(start=start, stop=stop, prefix=None, mask=mask, **positions))
    return tuple(blocks)


def take_spans(tensor: Tensor, wanted: Sequence[Sequence[tuple[int, int]]]) -> list[Tensor]:
    """tensor[:, :, start:stop] of each list of spans, one behind the other.

    The tensor is split once, which has a gradient of its length; each slice of its own would have one of that length.
    """
    cuts = sorted({0, tensor.shape[2], *(edge for spans in wanted for span in spans for edge in span)})
    places = {cut: place for place, cut in enumerate(cuts)}
    pieces = tensor.split([stop - start for start, stop in itertools.pairwise(cuts)], 2)
    taken = [[p for start, stop in spans for p in pieces[places[start] : places[stop]]] for spans in wanted]
    return [parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in taken]
