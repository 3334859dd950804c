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
_PARTS = 8  # what is computed beside the scores takes an eighth of their memory, or three
_SMALLEST_PART = 64  # tokens: each part costs the ranks some forty exchanges for top-p
_COARSE, _FINE = 10, 26  # halvings of the range of the last kept score, of all scores and then of those that are left


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

    Args:
        scores: [n, v] of this rank's rows of tokens that exist, in float32, after the temperature; v may be 0.
    """
    if not scores.shape[1]:
        scores = scores.new_full((len(scores), 1), -torch.inf)
    parts = scores.split(max(_SMALLEST_PART, -(-len(scores) // _PARTS)))
    return torch.cat([_Search(part, of, vocab_size, group).threshold() for part in parts])


@dataclass(frozen=True)
class _Search:
    """For the lowest kept score of some tokens."""

    scores: Tensor  # [n, v]
    of: Truncation
    vocab_size: int
    group: dist.ProcessGroup | None

    def threshold(self) -> Tensor:
        """[n]."""
        of, scores = self.of, self.scores
        top = self._merged(scores.amax(-1), dist.ReduceOp.MAX)
        least = top + math.log(of.min_p) if of.min_p else torch.full_like(top, -torch.inf)
        if of.top_k is not None and of.top_k < self.vocab_size:
            scores = scores.topk(min(of.top_k, scores.shape[1]), -1).values
            least = torch.maximum(least, self._kth_largest(scores, of.top_k))
        return least if of.top_p == 1.0 else self._last_of_top_p(scores, least, top)

    def _last_of_top_p(self, scores: Tensor, least: Tensor, top: Tensor) -> Tensor:
        """[n]: the lowest of the scores from `least` on whose sum of exp(score) is the first to reach top_p."""

        def mass_above(limit: Tensor) -> Tensor:
            torch.gt(scores, limit[:, None], out=chosen)
            return chosen.mul_(weights).sum(-1).double()

        weights, chosen = (scores - top[:, None]).exp_(), torch.empty_like(scores)
        below = torch.nextafter(least, torch.full_like(least, -torch.inf))
        wanted = self.of.top_p * self._merged(mass_above(below), dist.ReduceOp.SUM)
        # Tokens that are less likely than (1 - top_p) / vocab_size have together less than 1 - top_p: none is the last.
        low = torch.maximum(least, top + math.log((1 - self.of.top_p) / self.vocab_size)) - 0.01
        high = top
        for _ in range(_COARSE):
            middle = (low + high) / 2
            enough = self._merged(mass_above(middle), dist.ReduceOp.SUM) >= wanted
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        above, left = mass_above(high), (scores > low[:, None]) & (scores <= high[:, None])
        left = scores.masked_fill(~left, -torch.inf).topk(max(1, int(left.sum(-1).amax())), -1).values
        sums = (left - top[:, None]).double().exp_().cumsum(-1).add_(above[:, None])
        sums, ascending = torch.cat([above[:, None], sums], -1), -left
        for _ in range(_FINE):
            middle = (low + high) / 2
            found = sums.gather(-1, torch.searchsorted(ascending, -middle[:, None]))[:, 0]
            enough = self._merged(found, dist.ReduceOp.SUM) >= wanted
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        last = torch.where(left > low[:, None], left, torch.inf).amin(-1)
        return torch.maximum(least, self._merged(last, dist.ReduceOp.MIN))

    def _kth_largest(self, best: Tensor, k: int) -> Tensor:
        """[n]: of all ranks' scores, of which each has its k largest; -inf where there are fewer."""
        own = torch.cat([best, best.new_full((len(best), k - best.shape[1]), -torch.inf)], -1)
        every = [own]
        if self._is_split:
            every = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(every, own, group=self.group)
        return torch.cat(every, -1).topk(k, -1).values[:, -1]

    @property
    def _is_split(self) -> bool:
        return self.group is not None and self.group.size() > 1

    def _merged(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """Of all ranks, in the place of this rank's."""
        if self._is_split:
            dist.all_reduce(values, op=op, group=self.group)
        return values


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
