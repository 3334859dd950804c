"""Log-probabilities and entropy from logits whose vocabulary is split over the tensor-parallel group."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _LogProbsAndEntropy(torch.autograd.Function):
    """Forward: log p(target) and entropy; backward: one pass over the saved probabilities, in place."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, vocab_start: int, temperature: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        probs = logits.float() / temperature if temperature != 1.0 else logits.float().clone()  # [t, v/tp]
        largest = probs.amax(-1) if probs.shape[-1] else probs.new_full(probs.shape[:-1], -torch.inf)
        _all_reduce(largest, dist.ReduceOp.MAX, group)
        probs -= largest[:, None]
        local = targets - vocab_start
        inside = (local >= 0) & (local < probs.shape[-1])
        local = torch.where(inside, local, 0)
        rows = torch.arange(len(targets), device=logits.device)
        if probs.shape[-1]:
            chosen = torch.where(inside, probs[rows, local], 0.0)
        else:
            chosen = probs.new_zeros(len(targets))
        exponentials = probs.exp()
        sums = torch.stack([exponentials.sum(-1), torch.einsum("tv,tv->t", exponentials, probs), chosen])  # [3, t]
        _all_reduce(sums, dist.ReduceOp.SUM, group)
        total, weighted, chosen = sums
        log_total = total.log()
        log_probs, entropy = chosen - log_total, log_total - weighted / total
        probabilities = exponentials.div_(total[:, None])
        del probs
        ctx.save_for_backward(probabilities, entropy, inside, local, rows)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        grad_log_probs, grad_entropy = grads
        grad, entropy, inside, local, rows = ctx.saved_tensors  # grad: [t, v/tp], overwritten
        if grad_entropy is not None:
            # dH/dz_v = -p_v (log p_v + H)
            entropy_part = torch.special.xlogy(grad, grad).add_(grad * entropy[:, None]).mul_(-grad_entropy[:, None])
        grad_target = grad_log_probs if grad_log_probs is not None else torch.zeros_like(entropy)
        grad.mul_(-grad_target[:, None])
        if grad.shape[-1]:
            grad[rows, local] += torch.where(inside, grad_target, 0.0)
        if grad_entropy is not None:
            grad += entropy_part
        if ctx.temperature != 1.0:
            grad /= ctx.temperature
        return grad.to(ctx.dtype), None, None, None, None


def _all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)


def vocab_parallel_log_probs(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, of softmax(logits / temperature).

    Rows of the vocabulary beyond `vocab_size` are padding and take no part. Computed in float32 whatever comes in;
    the backward pass reuses the saved probabilities, so it can run once.

    Args:
        logits: [t, padded_vocab / tp], this rank's part of the vocabulary, in rank order.
        targets: [t] int64, global token ids below vocab_size.
        vocab_size: tokens that exist.
        group: tensor-parallel group; None for logits that are whole.
    Returns:
        (log_probs, entropy), each [t] float32, equal on every rank of the group. Entropy in nats.
    """
    rank = group.rank() if group is not None else 0
    vocab_start = rank * logits.shape[-1]
    valid = max(0, min(logits.shape[-1], vocab_size - vocab_start))
    log_probs, entropy = _LogProbsAndEntropy.apply(logits[:, :valid], targets, vocab_start, temperature, group)
    return log_probs, entropy
