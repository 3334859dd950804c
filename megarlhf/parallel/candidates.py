"""Logits of a few named tokens, and the likeliest token of all, where the vocabulary is split over tensor ranks."""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from megarlhf.parallel.vocab import OutputDistribution


def candidate_logits(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, of: OutputDistribution, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Logits of k tokens over the temperature: their log-softmax is that of the vocabulary without the other tokens.

    Each rank multiplies with the rows that it has; logits have the weights' dtype, all else is computed in float32
    (float64 for float64 weights).

    Args:
        hidden: [n, h], equal on every rank of the group; its gradient here is this rank's part of a sum over the group.
        weight: [padded_vocab / tp, h], this rank's rows of the output layer, in rank order.
        tokens: [k] int64 below vocab_size, on the device of `hidden`.
        group: tensor-parallel group; None for an output layer that is whole.
    Returns:
        [n, k] float32, equal on every rank of the group.
    """
    local = tokens - (0 if group is None else group.rank() * len(weight))
    inside = (local >= 0) & (local < len(weight))
    rows = weight.index_select(0, torch.where(inside, local, 0))
    own = hidden @ rows.t()
    logits = torch.where(inside, own, 0.0).to(torch.promote_types(own.dtype, torch.float32))
    if group is not None and group.size() > 1 and len(hidden):  # as many positions on every rank of the group
        logits = reduce_from_tensor_model_parallel_region(logits, group)
    if of.soft_cap is not None:
        logits = of.soft_cap * torch.tanh(logits / of.soft_cap)
    return logits / of.temperature


@torch.no_grad()
def likeliest_tokens(
    hidden: Tensor, weight: Tensor, *, of: OutputDistribution, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The token of the largest logit, the first of several; arguments as for `candidate_logits`, without gradients.

    Returns:
        [n] int64 below vocab_size, equal on every rank of the group.
    """
    first = 0 if group is None else group.rank() * len(weight)
    rows = weight[: max(0, min(len(weight), of.vocab_size - first))]  # those behind are padding
    largest = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    tokens = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    for start in range(0, len(hidden) if len(rows) else 0, of.chunk_tokens):
        chunk = slice(start, start + of.chunk_tokens)
        found, places = (hidden[chunk] @ rows.t()).max(-1)
        largest[chunk], tokens[chunk] = found.float(), places + first
    if group is None or group.size() == 1 or not len(hidden):
        return tokens
    every_largest, every_token = ([torch.empty_like(own) for _ in range(group.size())] for own in (largest, tokens))
    dist.all_gather(every_largest, largest, group=group)
    dist.all_gather(every_token, tokens, group=group)
    winners = torch.stack(every_largest).argmax(0)
    return torch.stack(every_token).gather(0, winners[None])[0]
