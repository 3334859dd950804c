"""Packed attention: what each run of tokens may look at, for Megatron-Core's layers on this device.

On CUDA, TransformerEngine's attention takes Megatron-Core's own packed parameters. On the CPU Megatron-Core's local
attention knows neither packing nor shared prompts; `SegmentAttention` is put in its place through the layer spec.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megarlhf.data.types import MicroBatch
from megarlhf.parallel.device import device_kind

_BLOCK_TOKENS = 256  # short segments share one masked product up to this many queries


@dataclass(frozen=True, kw_only=True)
class AttentionBlock:
    """Neighbouring segments computed in one product."""

    start: int  # first query
    stop: int  # past the last query
    prefix: tuple[int, int] | None  # keys of the shared prompt, seen whole
    mask: Tensor | None  # [queries, prefix + queries] bool, True where a query sees a key; None: plain causal


@dataclass
class SegmentParams(PackedSeqParams):
    """Packed parameters that name each token's position and each segment's shared prompt."""

    position_ids: Tensor | None = None  # [t] int64
    blocks: tuple[AttentionBlock, ...] = ()


def packed_params(batch: MicroBatch) -> PackedSeqParams:
    """What Megatron-Core's layers need to know of a packed micro-batch on this device.

    Raises:
        NotImplementedError: a shared prompt on CUDA, whose attention has no such mask.
    """
    if device_kind() == "gpu":
        if any(prefix is not None for prefix in batch.prefix_segments):
            raise NotImplementedError("share_prompt_prefix=True: TransformerEngine's attention has no shared prefix")
        longest = int((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).max())
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
    blocks = attention_blocks(batch.cu_seqlens.tolist(), batch.prefix_segments)
    return SegmentParams(qkv_format="sbhd", position_ids=batch.position_ids, blocks=blocks)


def attention_blocks(cu_seqlens: list[int], prefix_segments: tuple[int | None, ...]) -> tuple[AttentionBlock, ...]:
    """Group neighbouring segments that continue the same prompt into blocks of about _BLOCK_TOKENS queries."""
    blocks: list[AttentionBlock] = []
    members: list[int] = []

    def close() -> None:
        if members:
            blocks.append(_block(cu_seqlens, members, prefix_segments[members[0]]))
            members.clear()

    for segment, prefix in enumerate(prefix_segments):
        if members:
            tokens = cu_seqlens[segment + 1] - cu_seqlens[members[0]]
            if prefix != prefix_segments[members[0]] or tokens > _BLOCK_TOKENS:
                close()
        members.append(segment)
    close()
    return tuple(blocks)


def _block(cu_seqlens: list[int], members: list[int], prefix_segment: int | None) -> AttentionBlock:
    start, stop = cu_seqlens[members[0]], cu_seqlens[members[-1] + 1]
    prefix = None if prefix_segment is None else (cu_seqlens[prefix_segment], cu_seqlens[prefix_segment + 1])
    if prefix is None and len(members) == 1:
        return AttentionBlock(start=start, stop=stop, prefix=None, mask=None)
    owner = torch.cat([torch.full((cu_seqlens[m + 1] - cu_seqlens[m],), m) for m in members])
    mask = (owner[:, None] == owner[None, :]).tril()
    if prefix is not None:
        mask = torch.cat([mask.new_ones(stop - start, prefix[1] - prefix[0]), mask], dim=1)
    return AttentionBlock(start=start, stop=stop, prefix=prefix, mask=mask)


class SegmentAttention(MegatronModule):
    """Core attention over packed segments on the CPU, as torch's scaled dot product, block by block.

    Takes and gives Megatron-Core's [t, 1, heads / tp, head_dim] layout; grouped queries are expanded by torch.
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
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

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
        """[t, 1, h, d] queries and [t, 1, g, d] keys and values -> [t, 1, h * d]."""
        assert packed_seq_params is not None, "the engine always packs"
        tokens, _, heads, head_dim = query.shape
        repeats = heads // key.shape[2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [t, 1, h, d] -> [1, h, t, d]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        outputs = []
        for block in packed_seq_params.blocks:
            keys, values = k[:, :, block.start : block.stop], v[:, :, block.start : block.stop]
            if block.prefix is not None:
                first, last = block.prefix
                keys, values = torch.cat([k[:, :, first:last], keys], 2), torch.cat([v[:, :, first:last], values], 2)
            outputs.append(
                F.scaled_dot_product_attention(
                    q[:, :, block.start : block.stop],
                    keys,
                    values,
                    attn_mask=block.mask,
                    is_causal=block.mask is None,
                    scale=self.softmax_scale,
                )
            )
        return torch.cat(outputs, 2).permute(2, 0, 1, 3).reshape(tokens, 1, heads * head_dim)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Nothing to save."""
        return {}


class SegmentRotaryEmbedding(RotaryEmbedding):
    """Rotary angles of each packed token's own position.

    Megatron-Core asks for a sequence length and hands it to forward(); here that "length" is the positions themselves,
    which is how they reach forward() without state. Plain packed parameters keep Megatron-Core's behaviour.
    """

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> Any:
        """Positions [t] of segment parameters; Megatron-Core's own length for others."""
        params = args[4] if len(args) > 4 else kwargs.get("packed_seq_params")
        if isinstance(params, SegmentParams):
            return params.position_ids
        return super().get_rotary_seq_len(*args, **kwargs)

    def forward(self, max_seq_len: Any, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """[t, 1, 1, head_dim] angles for positions [t]."""
        if not torch.is_tensor(max_seq_len):
            return super().forward(max_seq_len, offset=offset, packed_seq=packed_seq, cp_group=cp_group)
        angles = torch.outer(max_seq_len.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]


class SegmentNorm(torch.nn.RMSNorm):
    """RMSNorm that works under sequence parallelism, which Megatron-Core's torch norm refuses.

    The mark on the weight tells Megatron-Core to sum its gradient over the tensor-parallel group.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (no such attribute, to mypy)
