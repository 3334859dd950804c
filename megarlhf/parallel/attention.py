"""Packed attention: what each run of tokens may look at, for Megatron-Core's layers.

TransformerEngine's attention takes Megatron-Core's own packed parameters. Megatron-Core's local attention knows neither
packing nor shared prompts; `SegmentAttention`, plain PyTorch, is put in its place through the layer spec.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megarlhf.data.types import MicroBatch
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


def packed_params(batch: MicroBatch, *, transformer_impl: str) -> PackedSeqParams:
    """What Megatron-Core's layers of that implementation need to know of a packed micro-batch.

    Raises:
        NotImplementedError: a shared prompt for TransformerEngine, whose attention has no such mask.
    """
    if transformer_impl == "transformer_engine":
        if any(prefix is not None for prefix in batch.prefix_segments):
            raise NotImplementedError("share_prompt_prefix=True: TransformerEngine's attention has no shared prefix")
        longest = int((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).max())
        # its context parallelism asserts that the padded lengths are given too; segments have no padding between them
        padded = batch.cu_seqlens if batch.context_size > 1 else None
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
    if batch.context_size > 1:
        rank = parallel_state.get_context_parallel_rank()
        blocks = context_blocks(batch.cu_seqlens, rank, batch.context_size)
    else:
        blocks = attention_blocks(batch.cu_seqlens.tolist(), batch.prefix_segments, batch.position_ids)
    return SegmentParams(qkv_format="sbhd", position_ids=batch.position_ids, blocks=blocks)


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
    """The blocks of one context rank: segments together up to _BLOCK_TOKENS, masks from places in the whole line."""
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


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How queries and keys become attention scores."""

    scale: float
    soft_cap: float | None = None  # a score x becomes soft_cap * tanh(x / soft_cap)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """[..., queries, keys] scores before masking."""
        scores = query @ key.transpose(-1, -2) * self.scale
        return scores if self.soft_cap is None else self.soft_cap * torch.tanh(scores / self.soft_cap)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[..., queries, d] attention output; without a mask it is causal."""
        if self.soft_cap is None:
            causal = mask is None
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=self.scale)
        scores = self.scores(query, key)
        seen = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
        return scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).type_as(value) @ value


class SegmentAttention(MegatronModule):
    """Core attention over packed segments, as torch's scaled dot product, block by block.

    Takes and gives Megatron-Core's [t, 1, heads / tp, head_dim] layout; grouped queries are expanded by torch. Under
    context parallelism keys and values are gathered from the group (cp_comm_type "all_gather"), or travel around it
    while each rank adds up what it has seen ("p2p").
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        soft_cap: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scoring = Scoring(scale=softmax_scale or 1.0 / math.sqrt(config.kv_channels), soft_cap=soft_cap)
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None  # Megatron-Core counts the tokens before
        self.context_group = parallel_state.get_context_parallel_group()
        self.travels = cp_comm_type != "all_gather" and self.context_group.size() > 1

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SegmentParams | None = None,
    ) -> Tensor:
        """[t, 1, h, d] queries and [t, 1, g, d] keys and values -> [t, 1, h * d]; values may have another d.

        Latent attention leaves out the dimension of 1.
        """
        assert packed_seq_params is not None, "the engine always packs"
        if query.dim() == 3:
            query, key, value = query[:, None], key[:, None], value[:, None]
        tokens, size = query.shape[0], self.context_group.size()
        blocks, masks = packed_seq_params.blocks, packed_seq_params.masks(self.window)
        if self.travels:
            lines = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            output = _RingAttention.apply(*lines, self.scoring, blocks, masks, self.context_group)
            return output.permute(2, 0, 1, 3).reshape(tokens, 1, -1)
        if size > 1:
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self.context_group) for x in (key, value)
            )
        repeats = query.shape[2] // key.shape[2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [t, 1, h, d] -> [1, h, t, d]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        outputs = []
        for block, mask in zip(blocks, masks, strict=True):
            keys, values = k[:, :, block.start : block.stop], v[:, :, block.start : block.stop]
            if size > 1:  # each rank's part of the block lies at the same place of its line
                parts = [slice(rank * tokens + block.start, rank * tokens + block.stop) for rank in range(size)]
                keys, values = (torch.cat([x[:, :, part] for part in parts], 2) for x in (k, v))
            if block.prefix is not None:
                first, last = block.prefix
                keys, values = torch.cat([k[:, :, first:last], keys], 2), torch.cat([v[:, :, first:last], values], 2)
            outputs.append(self.scoring.attend(q[:, :, block.start : block.stop], keys, values, mask))
        return torch.cat(outputs, 2).permute(2, 0, 1, 3).reshape(tokens, 1, -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Nothing to save."""
        return {}


class _RingAttention(torch.autograd.Function):
    """Attention whose keys and values pass through every rank of the context group, n - 1 hops forward.

    Partial results are merged by their log-sum-exp (Liu et al. 2023, Ring Attention, arXiv:2310.01889). In the
    backward pass keys and values go round again with the gradients that collect on them, n hops, so these come home.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
        blocks: tuple[AttentionBlock, ...],
        masks: list[Tensor],
        group: dist.ProcessGroup,
    ) -> Tensor:
        """[1, h, t, d] queries, [1, g, t, d] keys and values -> [1, h, t, d]."""
        repeats, size, rank = query.shape[1] // key.shape[1], group.size(), group.rank()
        output = query.new_zeros(*query.shape[:3], value.shape[-1])
        log_sum = query.new_full(query.shape[:3], -torch.inf)
        k, v = key, value
        for hop in range(size):
            source = (rank - hop) % size
            for block, mask in zip(blocks, masks, strict=True):
                part = slice(block.start, block.stop)
                keys, values = (x[:, :, part].repeat_interleave(repeats, 1) for x in (k, v))
                scores = scoring.scores(query[:, :, part], keys).masked_fill(_hidden(mask, source, size), -torch.inf)
                added = scores.logsumexp(-1)
                merged = torch.logaddexp(log_sum[:, :, part], added)
                safe = merged.masked_fill(merged == -torch.inf, 0.0)  # rows that have seen no key yet
                seen = (scores - safe[..., None]).exp() @ values
                output[:, :, part] = output[:, :, part] * (log_sum[:, :, part] - safe).exp()[..., None] + seen
                log_sum[:, :, part] = merged
            if hop < size - 1:
                k, v = _pass_on((k, v), group)
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.settings = (scoring, blocks, masks, group)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        (grad_output,) = grads
        query, key, value, output, log_sum = ctx.saved_tensors
        scoring, blocks, masks, group = ctx.settings
        repeats, size, rank = query.shape[1] // key.shape[1], group.size(), group.rank()
        delta = (grad_output * output).sum(-1, keepdim=True)
        grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        k, v = key, value

        def per_group(grad: Tensor) -> Tensor:
            return grad.unflatten(1, (-1, repeats)).sum(2)

        for hop in range(size):
            source = (rank - hop) % size
            for block, mask in zip(blocks, masks, strict=True):
                part = slice(block.start, block.stop)
                q, keys, values = query[:, :, part], *(x[:, :, part].repeat_interleave(repeats, 1) for x in (k, v))
                scores = scoring.scores(q, keys)
                probs = (scores - log_sum[:, :, part, None]).exp().masked_fill(_hidden(mask, source, size), 0.0)
                incoming = grad_output[:, :, part]
                grad_scores = probs * (incoming @ values.transpose(-1, -2) - delta[:, :, part]) * scoring.scale
                if scoring.soft_cap is not None:
                    grad_scores *= 1 - (scores / scoring.soft_cap) ** 2
                grad_query[:, :, part] += grad_scores @ keys
                grad_key[:, :, part] += per_group(grad_scores.transpose(-1, -2) @ q)
                grad_value[:, :, part] += per_group(probs.transpose(-1, -2) @ incoming)
            k, v, grad_key, grad_value = _pass_on((k, v, grad_key, grad_value), group)
        return grad_query, grad_key, grad_value, None, None, None, None


def _hidden(mask: Tensor, source: int, size: int) -> Tensor:
    """Which keys of one rank's part of a block this rank's queries do not see."""
    return ~mask.chunk(size, dim=1)[source]


def _pass_on(tensors: tuple[Tensor, ...], group: dist.ProcessGroup) -> list[Tensor]:
    """Send tensors to the next rank of the group and receive the previous one's."""
    size, rank = group.size(), group.rank()
    sent = torch.cat([tensor.reshape(-1) for tensor in tensors])
    received = torch.empty_like(sent)
    operations = [
        dist.P2POp(dist.isend, sent, dist.get_global_rank(group, (rank + 1) % size), group),
        dist.P2POp(dist.irecv, received, dist.get_global_rank(group, (rank - 1) % size), group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    parts = received.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class SegmentNorm(torch.nn.RMSNorm):
    """RMSNorm that works under sequence parallelism, which Megatron-Core's torch norm refuses.

    The mark on the weight tells Megatron-Core to sum its gradient over the tensor-parallel group.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.zero_centered = config.layernorm_zero_centered_gamma  # the factor is 1 + weight
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (no such attribute, to mypy)

    def forward(self, x: Tensor) -> Tensor:
        """x over its root mean square, times the weight."""
        if not self.zero_centered:
            return super().forward(x)
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).type_as(x)
