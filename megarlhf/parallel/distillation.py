"""Divergence of two output layers' distributions, where the vocabulary is split over the tensor-parallel group.

As in vocab.py logits exist for one chunk of tokens at a time, here the student's and the teacher's; one collective
after the last chunk merges what the ranks note; the last chunk is not computed again for the backward pass. Of a
vocabulary in parts r, with P_r the share of probability of a part and p_r the distribution inside of it, the chain rule
of the divergence gives KL(p || q) = sum_r P_r (KL(p_r || q_r) + log P_r - log Q_r).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megarlhf.parallel.vocab import OutputDistribution, OutputShard, WeightGradient, entry, token_blocks

Direction = Literal["forward", "reverse"]  # KL(teacher || student), or KL(student || teacher)


@dataclass(frozen=True, kw_only=True)
class TeacherLayer:
    """What the teacher's distributions come from; nothing of it takes a gradient.

    Attributes:
        hidden: [n, h] in the weights' dtype, equal on every rank of the group.
        weight: [v / tp, h] its output layer's rows of the tokens that the student's shard has.
    """

    hidden: Tensor
    weight: Tensor
    of: OutputDistribution


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The shards of both, and the buffers that hold a chunk's log-probs within this rank's rows: [chunk, v] each."""

    student: OutputShard
    teacher: OutputShard
    direction: Direction
    buffers: tuple[Tensor, Tensor]

    def log_probs(
        self, hidden: Tensor, rows: Tensor, layer: TeacherLayer, chunk: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of a chunk's tokens: the student's and the teacher's log-probs in the buffers, and their log-sum-exps.

        Returns:
            [n, v], [n, v], and [4, n]: the student's largest score and the log of its summed exp(score - largest), and
            the teacher's.
        """
        own = self.student.scores(hidden[chunk], rows, self.buffers[0])
        other = self.teacher.scores(layer.hidden[chunk], self.teacher.rows(layer.weight), self.buffers[1])
        sums = own.new_zeros(4, len(own))
        sums[0], sums[2] = -torch.inf, -torch.inf
        for scores, notes in ((own, sums[:2]), (other, sums[2:])):
            for block, _ in token_blocks(scores):
                part = scores[block]
                notes[0, block] = part.amax(-1)
                part.sub_(notes[0, block, None])
                notes[1, block] = part.exp().sum(-1).log_()
                part.sub_(notes[1, block, None])
        return own, other, sums

    def notes(self, own: Tensor, other: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        """[3, n]: the student's log-prob of the target (0 where it is elsewhere), KL, the teacher's entropy, all within
        this rank's rows."""
        notes = own.new_zeros(3, len(own))
        for block, _ in token_blocks(own):
            student, teacher, (local, inside) = own[block], other[block], (tensor[block] for tensor in places)
            notes[0, block] = torch.where(inside, entry(student, local), 0.0)
            first, second = (teacher, student) if self.direction == "forward" else (student, teacher)
            notes[1, block] = (first - second).mul_(first.exp()).sum(-1)
            notes[2, block] = -teacher.exp().mul_(teacher).sum(-1)
        return notes

    def merge(self, notes: Tensor, owners: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Over the whole vocabulary: log-probs, KL, the teacher's entropy; and what the backward pass needs.

        Args:
            notes: [7, n] of `notes` and `log_probs`.
        Returns:
            The last is [3, n]: the student's and the teacher's log of this rank's share, the student's log-sum-exp.
        """
        every = [notes]
        if self.student.is_split:
            assert self.student.group is not None
            every = [torch.empty_like(notes) for _ in range(self.student.group.size())]
            if notes.numel():
                dist.all_gather(every, notes, group=self.student.group)
        chosen, divergences, entropies, own_top, own_sum, other_top, other_sum = torch.stack(every, 1)  # each [tp, n]
        own, total = _log_shares(own_top, own_sum)
        other, _ = _log_shares(other_top, other_sum)
        first, second = (other, own) if self.direction == "forward" else (own, other)
        # A rank of padding alone has no share of either: its differences of infinities count nothing.
        divergence = torch.where(first > -torch.inf, first.exp() * (divergences + first - second), 0.0).sum(0)
        entropy = torch.where(other > -torch.inf, other.exp() * (entropies - other), 0.0).sum(0)
        log_probs = chosen.sum(0) + entry(own.t(), owners)
        rank = self.student.group.rank() if self.student.is_split and self.student.group is not None else 0
        return log_probs, divergence, entropy, torch.stack([own[rank], other[rank], total])

    def to_gradient(
        self, own: Tensor, other: Tensor, places: tuple[Tensor, Tensor], notes: Tensor, grads: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The student's logits' gradient in the place of its log-probs; overwrites the teacher's.

        Of log p(target): (one at the target) - p. Of the forward KL: p - q. Of the reverse: p (log p - log q - KL).

        Args:
            notes: [4, n] both logs of this rank's share, the student's log-sum-exp, KL.
            grads: of the log-probs and of the divergence, each [n].
        """
        grad_chosen, grad_divergence = (grad / self.student.of.temperature for grad in grads)
        for block, rows in token_blocks(own):
            student, teacher, (local, inside) = own[block], other[block], (tensor[block] for tensor in places)
            own_share, other_share, log_total, divergence = (note[block, None] for note in notes)
            by_chosen, by_divergence = grad_chosen[block, None], grad_divergence[block, None]
            student.add_(own_share)
            teacher.add_(other_share)
            slope = None if self.student.of.soft_cap is None else self.student.slope(student + log_total)
            if self.direction == "forward":
                teacher.exp_().mul_(by_divergence)
                student.exp_().mul_(by_divergence - by_chosen).sub_(teacher)
            else:
                teacher.neg_().add_(student).sub_(divergence).mul_(by_divergence).sub_(by_chosen)
                student.exp_().mul_(teacher)
            student[rows, local] += torch.where(inside, grad_chosen[block], 0.0)
            if slope is not None:
                student.mul_(slope)
        return own


def _log_shares(largest: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Each rank's share of probability as a log, [tp, n], and the log-sum-exp of all, [n]."""
    top = largest.amax(0)
    sums = largest - top + log_sums
    total = sums.logsumexp(0)
    return sums - total, top + total


class _Distillation(torch.autograd.Function):
    """Log-probs, divergence and the teacher's entropy, chunk by chunk; the backward pass runs once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, layer: TeacherLayer, pair: _Pair, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        shard = pair.student
        rows = shard.rows(weight)
        notes = pair.buffers[0].new_zeros(7, len(hidden))
        for chunk in shard.chunks(len(hidden)):
            own, other, notes[3:, chunk] = pair.log_probs(hidden, rows, layer, chunk)
            notes[:3, chunk] = pair.notes(own, other, shard.places(targets[chunk], weight))
        log_probs, divergence, entropy, sums = pair.merge(notes, targets // len(weight))
        if keep:
            ctx.save_for_backward(hidden, weight, targets, torch.cat([sums, divergence[None]]))
            ctx.layer, ctx.pair = layer, pair
        ctx.mark_non_differentiable(entropy)
        return log_probs, divergence, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, notes = ctx.saved_tensors
        pair, ctx.pair = ctx.pair, None
        shard = pair.student
        rows, chunks = shard.rows(weight), shard.chunks(len(hidden))
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = WeightGradient(weight, len(rows), len(chunks)) if ctx.needs_input_grad[1] else None
        for number, chunk in reversed(list(enumerate(chunks))):
            own, other = (buffer[: len(hidden[chunk])] for buffer in pair.buffers)
            if number < len(chunks) - 1:  # the last chunk's are there still
                pair.log_probs(hidden, rows, ctx.layer, chunk)
            places = shard.places(targets[chunk], weight)
            wanted = (grads[0][chunk], grads[1][chunk])
            grad = pair.to_gradient(own, other, places, notes[:, chunk], wanted).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, rows, out=grad_hidden[chunk])
            if total is not None:
                total.add(grad, hidden[chunk])
        return grad_hidden, None if total is None else total.result(), None, None, None, None


def vocab_parallel_distillation(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    of: OutputDistribution,
    teacher: TeacherLayer,
    direction: Direction,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's log-probability of each target, its divergence from the teacher, and the teacher's entropy.

    Forward is KL(teacher || student), whose gradient is that of the cross-entropy; reverse KL(student || teacher).
    Takes the memory of two float32 chunks of logits, [chunk_tokens, v / tp], and a quarter of one more.

    Args:
        hidden: [n, h], equal on every rank of the group; its gradient here is this rank's part of a sum over the group.
        weight: [padded_vocab / tp, h], this rank's rows of the student's output layer, in rank order.
        targets: [n] int64, global token ids below vocab_size, equal on every rank of the group.
        teacher: of as many tokens in the vocabulary.
        group: tensor-parallel group; None for output layers that are whole.
    Returns:
        (log_probs, divergence, entropy), each [n] float32 in nats, bit-equal on every rank of the group; the entropy
        has no gradient.
    """
    student, other = OutputShard(of=of, group=group), OutputShard(of=teacher.of, group=group)
    columns = len(student.rows(weight))
    assert columns == len(other.rows(teacher.weight)), "teacher and student have the same tokens on this rank"
    dtype = torch.promote_types(weight.dtype, torch.float32)
    chunk = min(len(hidden), of.chunk_tokens)
    buffers = (hidden.new_empty(chunk, columns, dtype=dtype), hidden.new_empty(chunk, columns, dtype=dtype))
    pair = _Pair(student=student, teacher=other, direction=direction, buffers=buffers)
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    log_probs, divergence, entropy = _Distillation.apply(hidden, weight, targets, teacher, pair, keep)
    return log_probs, divergence, entropy
