"""Sampling below the whole distribution: the tokens that top-k, top-p and min-p keep, where the vocabulary is split.

Kept are the tokens whose score is at least a threshold; all that are as likely as the last one are kept with it. The
order is vLLM's: temperature, min-p, the k likeliest of the rest, and of these the fewest that together have top_p of
their probability. No rank sees another's scores: sums and extremes for each token cross, and k scores for top-k.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

LEFT_OUT = -1e9  # score of a token that is not kept: exp(it) is 0, and no infinities meet
_HALVINGS = 32  # of the range of scores in which the last of the kept tokens is looked for


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """What of a distribution is kept."""

    top_p: float = 1.0  # the likeliest tokens that together have this probability
    top_k: int | None = None  # the k likeliest
    min_p: float = 0.0  # those at least this much as likely as the likeliest

    @property
    def is_whole(self) -> bool:
        """Whether everything is kept."""
        return self == Truncation()


def smallest_kept(scores: Tensor, of: Truncation, vocab_size: int, group: dist.ProcessGroup | None) -> Tensor:
    """[n] thresholds: every kept token of any rank has at least this score, all others less; bit-equal on each rank.

    For top-p the likeliest tokens here are sorted, as many as the flattest distribution needs.

    Args:
        scores: [n, v] of this rank's rows of tokens that exist, in float32, after the temperature; v may be 0.
    """

    def merged(values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if group is not None and group.size() > 1:
            dist.all_reduce(values, op=op, group=group)
        return values

    padded = scores if scores.shape[1] else scores.new_full((len(scores), 1), -torch.inf)
    top = merged(padded.amax(-1), dist.ReduceOp.MAX)
    least = top + math.log(of.min_p) if of.min_p else torch.full_like(top, -torch.inf)
    best = padded
    if of.top_k is not None and of.top_k < vocab_size:
        best = padded.topk(min(of.top_k, padded.shape[1]), -1).values
        least = torch.maximum(least, _kth_largest(best, of.top_k, group))
    if of.top_p == 1.0:
        return least
    mass = merged(_mass(best, least, top), dist.ReduceOp.SUM)
    # The tokens below this have together less than 1 - top_p: the last kept one is above.
    bound = torch.maximum(least, (top + (mass * ((1 - of.top_p) / vocab_size)).log()).to(top.dtype))
    count = int((best >= bound[:, None]).sum(-1).amax()) if len(best) else 0
    best = best.topk(max(count, 1), -1).values
    low, high = bound.double() - 1.0, top.double()
    probability = torch.where(best >= least[:, None], (best - top[:, None]).double().exp(), 0.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = merged((probability * (best > middle[:, None])).sum(-1), dist.ReduceOp.SUM)
        enough = above >= of.top_p * mass
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    last = torch.where(best > low[:, None], best, torch.inf).amin(-1)
    return torch.maximum(least, merged(last, dist.ReduceOp.MIN))


def _kth_largest(best: Tensor, k: int, group: dist.ProcessGroup | None) -> Tensor:
    """[n]: of all ranks' scores, of which each has its k largest; -inf where there are fewer."""
    own = torch.cat([best, best.new_full((len(best), k - best.shape[1]), -torch.inf)], -1)
    every = [own]
    if group is not None and group.size() > 1:
        every = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(every, own, group=group)
    return torch.cat(every, -1).topk(k, -1).values[:, -1]


def _mass(scores: Tensor, least: Tensor, top: Tensor) -> Tensor:
    """[n] float64: sum of exp(score - top) over scores from `least` on."""
    mass = [
        torch.where(s >= a[:, None], (s - b[:, None]).exp(), 0.0).sum(-1, dtype=torch.float64)
        for s, a, b in zip(scores.split(128), least.split(128), top.split(128), strict=True)
    ]
    return torch.cat(mass) if mass else top.double()


def leave_out(scores: Tensor, least: Tensor, places: tuple[Tensor, Tensor]) -> None:
    """Give tokens below their `least` [n] the score LEFT_OUT, but for the targets, which were sampled.

    Args:
        places: of the targets, as OutputShard.places gives them.
    """
    _keep(scores, scores >= least[:, None], places)


def leave_out_others(scores: Tensor, kept: Tensor, places: tuple[Tensor, Tensor]) -> None:
    """The same for all tokens but the kept ones [n, k] int64, columns of `scores`, -1 where there are fewer."""
    columns = scores.shape[1]
    mask = torch.zeros(len(scores), columns + 1, dtype=torch.bool, device=scores.device)
    mask.scatter_(-1, torch.where(kept < 0, columns, kept), True)
    _keep(scores, mask[:, :columns], places)


def _keep(scores: Tensor, mask: Tensor, places: tuple[Tensor, Tensor]) -> None:
    if not scores.shape[1]:
        return
    columns, inside = places[0][:, None], places[1][:, None]
    mask.scatter_(-1, columns, mask.gather(-1, columns) | inside)
    scores.masked_fill_(mask.logical_not_(), LEFT_OUT)


def kept_columns(scores: Tensor, least: Tensor, k: int) -> Tensor:
    """[n, k] int64: columns of the tokens from `least` on, at most the k likeliest, -1 where there are fewer."""
    found = torch.full((len(scores), k), -1, device=scores.device)
    values, columns = scores.topk(min(k, scores.shape[1]), -1)
    found[:, : columns.shape[1]] = torch.where(values >= least[:, None], columns, -1)
    return found
