"""Log-probabilities and entropy from hidden states, where the vocabulary is split over the tensor-parallel group.

Logits exist for one chunk of tokens at a time. Going forward each rank notes a few numbers per token; one collective
after the last chunk merges those of all ranks. The last chunk's probabilities stay for the backward pass, which begins
there: what fits one chunk is computed once. Earlier chunks are computed again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megarlhf.parallel.truncation import Truncation, kept_columns, leave_out, leave_out_others, smallest_kept

EntropyUse = Literal["unused", "metric", "loss"]  # not computed; without a gradient; with one

_PARTS = 8  # what is computed beside a chunk's logits takes an eighth of their memory


@dataclass(frozen=True, kw_only=True)
class OutputDistribution:
    """How an output layer's logits become a distribution of the next token: softmax(cap(logits) / temperature)."""

    vocab_size: int  # tokens that exist; rows of the output layer beyond are padding and take no part
    chunk_tokens: int  # tokens whose logits exist at once
    temperature: float = 1.0
    soft_cap: float | None = None  # a logit x becomes soft_cap * tanh(x / soft_cap)
    truncation: Truncation = Truncation()  # of log-probs, entropy and their gradients


@dataclass(frozen=True, kw_only=True)
class OutputShard:
    """This rank's part of the output layer, and what is computed with it."""

    of: OutputDistribution
    entropy: EntropyUse = "unused"
    group: dist.ProcessGroup | None  # None: the output layer is whole

    @property
    def is_split(self) -> bool:
        """Whether other ranks have parts too."""
        return self.group is not None and self.group.size() > 1

    def rows(self, weight: Tensor) -> Tensor:
        """[v, h]: the rows of tokens that exist, which the last ranks may have fewer of, or none."""
        return weight[: max(0, min(len(weight), self.of.vocab_size - self._first(weight)))]

    def _first(self, weight: Tensor) -> int:
        return self.group.rank() * len(weight) if self.group is not None else 0

    def places(self, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Each target's row here (0 where it is another rank's), and whether it is here: [n] int64, [n] bool."""
        local = targets - self._first(weight)
        inside = (local >= 0) & (local < len(self.rows(weight)))
        return torch.where(inside, local, 0), inside

    def chunks(self, length: int) -> list[slice]:
        """The chunks of `length` tokens, in order."""
        size = self.of.chunk_tokens
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]

    def scores(self, hidden: Tensor, rows: Tensor, buffer: Tensor) -> Tensor:
        """[n, v] logits over the temperature, in the buffer; products and soft cap in the weights' dtype."""
        scores = buffer[: len(hidden)]
        exact = rows.dtype == scores.dtype
        logits = torch.mm(hidden, rows.t(), out=scores) if exact else torch.mm(hidden, rows.t())
        if self.of.soft_cap is not None:
            logits.div_(self.of.soft_cap).tanh_().mul_(self.of.soft_cap)
        if not exact:
            scores.copy_(logits)
        return scores if self.of.temperature == 1.0 else scores.div_(self.of.temperature)

    def truncate(
        self, scores: Tensor, places: tuple[Tensor, Tensor], kept: Tensor | None, least: Tensor, *, known: bool
    ) -> None:
        """Leave tokens out of a chunk's scores: all but the kept ones, or by the distribution's truncation.

        Args:
            kept: [n, k] int64 columns; None: the truncation's, whose lowest scores are put into `least` [n], or are
                there if they are `known`.
        """
        if kept is not None:
            leave_out_others(scores, kept, places)
        elif not self.of.truncation.is_whole:
            if not known:
                least.copy_(smallest_kept(scores, self.of.truncation, self.of.vocab_size, self.group))
            leave_out(scores, least, places)

    def normalize(self, scores: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        """Overwrite scores with exp(log-softmax over this rank's rows).

        Returns:
            [4, n]: the target's log-prob within this rank's rows (0 where it is elsewhere), the largest score, the log
            of the summed exp(score - largest), the entropy of this rank's rows.
        """
        notes = scores.new_zeros(4, len(scores))
        if not scores.shape[-1]:
            notes[1] = -torch.inf
            return notes
        for part, _ in token_blocks(scores):
            block, (local, inside) = scores[part], (tensor[part] for tensor in places)
            log_probs = block.log_softmax(-1)
            notes[0, part] = torch.where(inside, entry(log_probs, local), 0.0)
            if self.is_split or self.of.soft_cap is not None:
                notes[1, part], notes[2, part] = block.amax(-1), -log_probs.amax(-1)
            torch.exp(log_probs, out=block)
            if self.entropy != "unused":
                notes[3, part] = -log_probs.mul_(block).sum(-1)
            del log_probs  # before the next part's, so that one is held at a time
        return notes

    def merge(self, notes: Tensor, owners: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probs and entropy over the whole vocabulary, this rank's share of probability as a log, log-sum-exp."""
        if not self.is_split:
            return notes[0], notes[3], torch.zeros_like(notes[0]), notes[1] + notes[2]
        assert self.group is not None
        every = [torch.empty_like(notes) for _ in range(self.group.size())]
        if notes.numel():
            dist.all_gather(every, notes, group=self.group)
        chosen, largest, log_sums, entropies = torch.stack(every, 1)  # each [tp, n]
        top = largest.amax(0)
        sums = largest - top + log_sums
        total = sums.logsumexp(0)
        log_shares = sums - total  # -inf for a rank that holds padding alone
        log_probs = chosen.sum(0) + entry(log_shares.t(), owners)
        shares = log_shares.exp()
        entropy = (shares * entropies + torch.special.entr(shares)).sum(0)
        return log_probs, entropy, log_shares[self.group.rank()], top + total

    def to_gradient(
        self, probs: Tensor, places: tuple[Tensor, Tensor], notes: Tensor, grads: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        """The logits' gradient in the place of this rank's probabilities, [n, v] in their dtype.

        Of log p(target): (one at the target) - p; of the entropy H: -p (log p + H).

        Args:
            notes: [4, n] the target's log-prob, entropy, the log of this rank's share of probability, log-sum-exp.
            grads: of the log-probs and, with entropy "loss", of the entropy, each [n].
        """
        grad_chosen, grad_entropy = (None if grad is None else grad / self.of.temperature for grad in grads)
        assert grad_chosen is not None
        chosen, entropy, log_share, log_total = notes
        for part, rows in token_blocks(probs):
            block, (local, inside), share = probs[part], (tensor[part] for tensor in places), log_share[part, None]
            factor, slope = -grad_chosen[part, None], None
            if grad_entropy is not None or self.of.soft_cap is not None:
                log_probs = block.clamp(min=torch.finfo(block.dtype).tiny).log_().add_(share)
                if self.of.soft_cap is not None:
                    slope = self.slope(log_probs + log_total[part, None])
                if grad_entropy is not None:
                    factor = log_probs.add_(entropy[part, None]).mul_(-grad_entropy[part, None]).add_(factor)
            factor = factor * share.exp() if self.is_split else factor
            at_target = entry(block, local) * entry(factor.expand_as(block), local) + grad_chosen[part]
            block.mul_(factor)
            if slope is not None:
                block.mul_(slope)
                at_target *= self.slope(chosen[part] + log_total[part])  # exact where exp(log p) is 0
            block[rows, local] = torch.where(inside, at_target, entry(block, local))
        return probs

    def slope(self, scores: Tensor) -> Tensor:
        """Derivative of a capped logit by the logit, of logits over the temperature; overwrites them."""
        assert self.of.soft_cap is not None
        return scores.mul_(self.of.temperature / self.of.soft_cap).square_().neg_().add_(1.0)


def token_blocks(scores: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of a chunk's tokens, each an eighth of it, with numbers for the tokens of each; none for no columns."""
    size = max(1, -(-len(scores) // _PARTS))
    for start in range(0, len(scores) if scores.shape[-1] else 0, size):
        stop = min(start + size, len(scores))
        yield slice(start, stop), torch.arange(stop - start, device=scores.device)


def entry(table: Tensor, columns: Tensor) -> Tensor:
    """[n]: the entry of each row of [n, columns]."""
    return table.gather(-1, columns[:, None])[:, 0]


class _LogProbs(torch.autograd.Function):
    """Log-probs and entropy of hidden states, chunk by chunk; the backward pass runs once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, kept: Tensor | None, part: OutputShard, keep: bool
    ) -> tuple[Tensor, Tensor]:
        rows = part.rows(weight)
        # Holds scores, probabilities and gradients in turn.
        dtype = torch.promote_types(rows.dtype, torch.float32)
        buffer = hidden.new_empty(min(len(hidden), part.of.chunk_tokens), len(rows), dtype=dtype)
        notes, least = buffer.new_zeros(4, len(hidden)), buffer.new_empty(len(hidden))
        for chunk in part.chunks(len(hidden)):
            scores, places = part.scores(hidden[chunk], rows, buffer), part.places(targets[chunk], weight)
            part.truncate(scores, places, None if kept is None else kept[chunk], least[chunk], known=False)
            notes[:, chunk] = part.normalize(scores, places)
        log_probs, entropy, log_share, log_total = part.merge(notes, targets // len(weight))
        if keep:
            notes = torch.stack([log_probs, entropy, log_share, log_total])
            ctx.save_for_backward(hidden, weight, targets, kept, least, notes)
            ctx.part, ctx.buffer = part, buffer
        ctx.set_materialize_grads(False)
        if part.entropy != "loss":
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden, weight, targets, kept, least, notes = ctx.saved_tensors
        part, buffer, ctx.buffer = ctx.part, ctx.buffer, None
        rows, chunks = part.rows(weight), part.chunks(len(hidden))
        grad_log_probs = torch.zeros_like(notes[0]) if grads[0] is None else grads[0]
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = WeightGradient(weight, len(rows), len(chunks)) if ctx.needs_input_grad[1] else None
        for number, chunk in reversed(list(enumerate(chunks))):
            probs, places = buffer[: len(hidden[chunk])], part.places(targets[chunk], weight)
            if number < len(chunks) - 1:  # the last chunk's are there still
                probs = part.scores(hidden[chunk], rows, buffer)
                part.truncate(probs, places, None if kept is None else kept[chunk], least[chunk], known=True)
                part.normalize(probs, places)
            wanted = (grad_log_probs[chunk], None if grads[1] is None else grads[1][chunk])
            grad = part.to_gradient(probs, places, notes[:, chunk], wanted).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, rows, out=grad_hidden[chunk])
            if total is not None:
                total.add(grad, hidden[chunk])
        return grad_hidden, None if total is None else total.result(), None, None, None, None


class WeightGradient:
    """The output layer's gradient, added up over chunks in float32 where there are several."""

    def __init__(self, weight: Tensor, num_rows: int, num_chunks: int) -> None:
        dtype = weight.dtype if num_chunks == 1 else torch.promote_types(weight.dtype, torch.float32)
        self._sum = torch.empty_like(weight, dtype=dtype)
        self._rows = self._sum[:num_rows]
        self._sum[num_rows if num_chunks else 0 :].zero_()
        self._dtype, self._empty = weight.dtype, True

    def add(self, grad: Tensor, hidden: Tensor) -> None:
        """Add a chunk's, of its logits' gradient [n, v] and its hidden states [n, h]."""
        if grad.dtype != self._sum.dtype:
            product = torch.mm(grad.t(), hidden)
            self._rows.copy_(product) if self._empty else self._rows.add_(product)
        else:
            torch.addmm(self._rows, grad.t(), hidden, beta=0.0 if self._empty else 1.0, out=self._rows)
        self._empty = False

    def result(self) -> Tensor:
        """[v / tp, h] in the weight's dtype; padding rows are 0."""
        return self._sum.to(self._dtype)


def vocab_parallel_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    of: OutputDistribution,
    entropy: EntropyUse = "unused",
    kept: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and entropy of each distribution, of an output layer's logits.

    Logits have the weights' dtype, all else is computed in float32 (float64 for float64 weights). Takes the memory of
    one float32 chunk of logits, [chunk_tokens, v / tp], and an eighth more (up to three eighths for the gradient of
    entropy or under a soft cap); with weights of another dtype a chunk in that dtype beside it.

    Args:
        hidden: [n, h], equal on every rank of the group; its gradient here is this rank's part of a sum over the group.
        weight: [padded_vocab / tp, h], this rank's rows of the output layer, in rank order.
        targets: [n] int64, global token ids below vocab_size, equal on every rank of the group.
        kept: [n, k] int64, this rank's part of the tokens to which each distribution is restricted, by
            vocab_parallel_kept_tokens; None: those that the truncation keeps. A target is always kept.
        group: tensor-parallel group; None for an output layer that is whole.
    Returns:
        (log_probs, entropy), each [n] float32, bit-equal on every rank of the group; entropy in nats, None where it is
        unused.
    """
    part = OutputShard(of=of, entropy=entropy, group=group)
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    log_probs, entropies = _LogProbs.apply(hidden, weight, targets, kept, part, keep)
    return log_probs, None if entropy == "unused" else entropies


def vocab_parallel_kept_tokens(
    hidden: Tensor, weight: Tensor, *, of: OutputDistribution, group: dist.ProcessGroup | None = None
) -> Tensor:
    """[n, k] int64: this rank's part of the tokens that the truncation keeps, -1 where there are fewer than its top_k.

    Arguments as of vocab_parallel_log_probs, which takes them back for other weights.
    """
    part, k = OutputShard(of=of, group=group), of.truncation.top_k
    assert k is not None, "top_k bounds what is kept: config/check_numbers.py asks for it"
    rows = part.rows(weight).detach()
    dtype = torch.promote_types(rows.dtype, torch.float32)
    buffer = hidden.new_empty(min(len(hidden), of.chunk_tokens), len(rows), dtype=dtype)
    kept = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    for chunk in part.chunks(len(hidden)):
        scores = part.scores(hidden[chunk].detach(), rows, buffer)
        kept[chunk] = kept_columns(scores, smallest_kept(scores, of.truncation, of.vocab_size, group), k)
    return kept
