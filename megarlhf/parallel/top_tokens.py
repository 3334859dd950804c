"""The likeliest tokens of an output layer's distributions, and the probabilities of given tokens and of all others.

The vocabulary is split over the tensor-parallel group, and logits exist for one chunk of tokens at a time, as in
vocab.py. Here the backward pass computes every chunk again.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarlhf.parallel.vocab import OutputDistribution, OutputShard, WeightGradient, entry, token_blocks


def vocab_parallel_top_tokens(
    hidden: Tensor, weight: Tensor, k: int, *, of: OutputDistribution, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens, likeliest first, and their log-probs; arguments as of vocab_parallel_log_probs.

    Args:
        k: below vocab_size.
    Returns:
        [n, k] int64 token ids; [n, k + 1] float32 log-probs of them and, last, of all other tokens together. Neither
        has a gradient; both are bit-equal on every rank of the group.
    """
    shard = OutputShard(of=of, group=group)
    rows = shard.rows(weight).detach()
    first = len(weight) * (group.rank() if group is not None else 0)
    buffer, notes = _buffer(hidden, rows, of), hidden.new_empty(len(hidden), 2 * k + 1, dtype=torch.float64)
    notes[:, :k], notes[:, k:] = 0, -torch.inf
    for chunk in shard.chunks(len(hidden)):
        scores = shard.scores(hidden[chunk].detach(), rows, buffer)
        best, places = scores.topk(min(k, len(rows)), -1)
        notes[chunk, : places.shape[1]], notes[chunk, k : k + places.shape[1]] = (
            (places + first).double(),
            best.double(),
        )
        notes[chunk, 2 * k] = (
            scores.scatter_(-1, places, -torch.inf).logsumexp(-1).double() if len(rows) else -torch.inf
        )
    every = _gathered(shard, notes)  # [tp, n, 2k + 1]
    ids, scores, rests = every[..., :k], every[..., k : 2 * k], every[..., 2 * k]
    ids, scores = (part.permute(1, 0, 2).flatten(1) for part in (ids, scores))  # [n, tp * k]
    best, places = scores.topk(k, -1)
    left = torch.cat([scores.scatter(-1, places, -torch.inf), rests.t()], -1)
    both = torch.cat([best, left.logsumexp(-1, keepdim=True)], -1)
    return ids.gather(-1, places).long(), both.log_softmax(-1).float()


class _Buckets(torch.autograd.Function):
    """Log-probs of targets, of given tokens, and of all but these together."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ids: Tensor, shard: OutputShard
    ) -> tuple[Tensor, Tensor]:
        rows, k = shard.rows(weight), ids.shape[1]
        buffer = _buffer(hidden, rows, shard.of)
        notes = buffer.new_zeros(len(hidden), k + 2)  # target, given tokens, the others' log-sum-exp: of this rank
        for chunk in shard.chunks(len(hidden)):
            scores = shard.scores(hidden[chunk], rows, buffer)
            for block, _ in token_blocks(scores):
                part, inside_chunk = scores[block], slice(chunk.start + block.start, chunk.start + block.stop)
                target, here = shard.places(targets[inside_chunk], weight)
                notes[inside_chunk, 0] = torch.where(here, entry(part, target), 0.0)
                chosen, inside = shard.places(ids[inside_chunk], weight)
                notes[inside_chunk, 1 : k + 1] = torch.where(inside, part.gather(-1, chosen), 0.0)
                part.masked_fill_(_mask(part, chosen, inside), -torch.inf)
                notes[inside_chunk, k + 1] = part.logsumexp(-1)
            if not len(rows):
                notes[chunk, k + 1] = -torch.inf
        every = _gathered(shard, notes)
        scores = torch.cat([every[..., 1 : k + 1].sum(0), every[..., k + 1].logsumexp(0)[:, None]], -1)
        total = scores.logsumexp(-1)
        ctx.save_for_backward(hidden, weight, targets, ids, torch.stack([total, scores[:, k]]))
        ctx.shard = shard
        return every[..., 0].sum(0) - total, scores - total[:, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, ids, notes = ctx.saved_tensors
        shard: OutputShard = ctx.shard
        by_target, by_bucket = (grad / shard.of.temperature for grad in grads)
        rows, chunks = shard.rows(weight), shard.chunks(len(hidden))
        buffer = _buffer(hidden, rows, shard.of)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = WeightGradient(weight, len(rows), len(chunks)) if ctx.needs_input_grad[1] else None
        for chunk in chunks:
            scores = shard.scores(hidden[chunk], rows, buffer)
            for block, numbers in token_blocks(scores):
                part, here = scores[block], slice(chunk.start + block.start, chunk.start + block.stop)
                slope = None if shard.of.soft_cap is None else shard.slope(part.clone())
                log_total, log_rest = (note[here, None] for note in notes)
                chosen, inside = shard.places(ids[here], weight)
                rest = (part - log_rest).exp_().masked_fill_(_mask(part, chosen, inside), 0.0)
                part.sub_(log_total).exp_().mul_(-(by_target[here] + by_bucket[here].sum(-1))[:, None])
                part.add_(rest.mul_(by_bucket[here, -1:]))
                part.scatter_add_(-1, chosen, torch.where(inside, by_bucket[here, :-1], 0.0))
                target, is_here = shard.places(targets[here], weight)
                part[numbers, target] += torch.where(is_here, by_target[here], 0.0)
                if slope is not None:
                    part.mul_(slope)
            grad = scores.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, rows, out=grad_hidden[chunk])
            if total is not None:
                total.add(grad, hidden[chunk])
        return grad_hidden, None if total is None else total.result(), None, None, None


def vocab_parallel_bucket_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ids: Tensor,
    *,
    of: OutputDistribution,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, of given tokens, and of all other tokens together.

    Takes the memory of one float32 chunk of logits and a quarter more; other arguments as of vocab_parallel_log_probs.

    Args:
        ids: [n, k] int64, k different tokens for each position and fewer than there are.
    Returns:
        [n] float32; [n, k + 1] float32, whose last is of the others. Bit-equal on every rank of the group.
    """
    log_probs, buckets = _Buckets.apply(hidden, weight, targets, ids, OutputShard(of=of, group=group))
    return log_probs, buckets


def _buffer(hidden: Tensor, rows: Tensor, of: OutputDistribution) -> Tensor:
    """For a chunk's logits."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return hidden.new_empty(min(len(hidden), of.chunk_tokens), len(rows), dtype=dtype)


def _mask(scores: Tensor, places: Tensor, inside: Tensor) -> Tensor:
    """[n, v] bool: the entries that are named and here; what is elsewhere falls into a further column."""
    columns = scores.shape[-1]
    mask = torch.zeros(len(scores), columns + 1, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, torch.where(inside, places, columns), True)[:, :columns]


def _gathered(shard: OutputShard, notes: Tensor) -> Tensor:
    """[tp, ...]: every rank's."""
    if not shard.is_split:
        return notes[None]
    assert shard.group is not None
    every = [torch.empty_like(notes) for _ in range(shard.group.size())]
    if notes.numel():
        dist.all_gather(every, notes, group=shard.group)
    return torch.stack(every)
