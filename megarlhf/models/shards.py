"""Which part of which HF tensor lies where inside a rank's Megatron parameter.

Every relation is a pair of views with equal numbers in equal places: loading copies one way, export the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarlhf.formats.huggingface import HFConfig
from megarlhf.formats.shared_memory import copy_part
from megarlhf.models.arch import Split, WeightMap
from megarlhf.models.families import head_dim


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One HF tensor's part in a Megatron parameter."""

    hf_name: str
    index: tuple[slice, ...]  # this rank's part of the HF tensor
    view: Tensor  # the same numbers inside the Megatron parameter; may have more dimensions than the HF part

    def store(self, hf_part: Tensor) -> None:
        """Copy the HF part (already indexed) into the Megatron parameter."""
        self.view.copy_(hf_part.reshape(self.view.shape))

    def emit(self, hf_tensor: Tensor) -> None:
        """Copy the Megatron numbers into this rank's part of a whole HF tensor."""
        copy_part(self.view, hf_tensor, self.index)


def shards_of(weight: WeightMap, param: Tensor, model: HFConfig, *, tp_rank: int, tp_size: int) -> list[Shard]:
    """The HF parts of one local Megatron parameter, in the order of `weight.hf`.

    Args:
        param: this rank's parameter data.
        tp_rank, tp_size: in the group that cuts this weight (for experts, the expert-tensor-parallel group).
        model: its vocab_size are the embedding's rows; the rest of a VOCAB parameter is padding and in no shard.
    """
    hf = weight.hf
    if weight.split is Split.REPLICATED:
        return [Shard(hf_name=hf[0], index=(slice(None),) * param.dim(), view=param)]
    if weight.split is Split.ROW:
        return [Shard(hf_name=hf[0], index=(slice(None), _part(param.shape[1], tp_rank)), view=param)]
    if weight.split is Split.VOCAB:
        first = param.shape[0] * tp_rank
        valid = max(0, min(param.shape[0], model.vocab_size - first))
        return [Shard(hf_name=hf[0], index=(slice(first, first + valid), slice(None)), view=param[:valid])]
    if weight.split is Split.QKV:
        return _qkv_shards(hf, param, model, tp_rank, tp_size)
    parts = zip(hf, param.chunk(len(hf)), strict=True)  # COLUMN: one, GATE_UP: two
    return [Shard(hf_name=name, index=_rows(part, len(part), tp_rank), view=part) for name, part in parts]


def _qkv_shards(hf: tuple[str, ...], param: Tensor, model: HFConfig, tp_rank: int, tp_size: int) -> list[Shard]:
    groups, queries = model.num_key_value_heads // tp_size, model.num_attention_heads // model.num_key_value_heads
    # [groups * (queries + 2) * head_dim, ...] -> [groups, queries + 2, head_dim, ...]: q heads, k, v of each group
    whole = param.view(groups, queries + 2, head_dim(model), *param.shape[1:])
    views = (whole[:, :queries], whole[:, queries], whole[:, queries + 1])
    return [
        Shard(hf_name=name, index=_rows(param, view.numel() // param[0].numel(), tp_rank), view=view)
        for name, view in zip(hf, views, strict=True)
    ]


def fused_outputs(weight: WeightMap, parts: Sequence[Tensor | None], size: int, model: HFConfig) -> Tensor:
    """[..., size]: outputs of a weight's HF matrices in the order of the Megatron parameter's rows.

    Args:
        parts: this rank's outputs of each, in the order of `weight.hf`; None: zeros.
        size: rows of this rank's parameter.
    """
    given = next(part for part in parts if part is not None)
    if len(parts) == 1:
        return given
    if weight.split is not Split.QKV:
        half = (*given.shape[:-1], size // len(parts))
        return torch.cat([given.new_zeros(half) if part is None else part for part in parts], -1)
    head, queries = head_dim(model), model.num_attention_heads // model.num_key_value_heads
    groups = size // (head * (queries + 2))
    heads = [
        given.new_zeros(*given.shape[:-1], groups, num, head)
        if part is None
        else part.unflatten(-1, (groups, num, head))
        for part, num in zip(parts, (queries, 1, 1), strict=True)
    ]
    return torch.cat(heads, -2).flatten(-3)


def _part(length: int, rank: int) -> slice:
    return slice(length * rank, length * (rank + 1))


def _rows(param: Tensor, count: int, rank: int) -> tuple[slice, ...]:
    return (_part(count, rank), *(slice(None) for _ in param.shape[1:]))
