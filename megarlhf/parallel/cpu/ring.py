"""Attention scores, and ring attention over the context-parallel group."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megarlhf.parallel.cpu.segments import AttentionBlock


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


class RingAttention(torch.autograd.Function):
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
        """Gradients of queries, keys and values, each in its own shape."""
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
