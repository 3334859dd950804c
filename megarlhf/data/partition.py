"""A step's rows on the data-parallel ranks of a role: the driver partitions them, each rank keeps its own.

The driver knows lengths alone. Tokens go from the engines that generated them to the ranks that train on them; what
later passes compute stays with the rows, and only new fields follow.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megarlhf.data.packing import copy_runs, fill_fields
from megarlhf.data.planning import PackingOptions, plan_micro_batches, prompt_units
from megarlhf.data.types import (
    KEPT_TOKENS,
    Floats,
    GroupTokens,
    Ints,
    MicroBatch,
    Sample,
    TargetValues,
    TrainingRows,
    starts_of,
)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A data-parallel rank's rows of a step, without their tokens."""

    groups: Ints  # [g] group_ids whose tokens it needs, ascending
    group_of_row: Ints  # [n] place in `groups` of each of its rows
    sample_ids: Ints  # [n]
    unit_ids: Ints  # [n]
    plan: list[list[list[int]]]  # [mini-batch][micro-batch] -> its own row numbers; a mini-batch is one optimizer step


class DataParallelSplit:
    """A step's rows over the data-parallel ranks of a role.

    Args:
        samples: of the step, in an order that all its per-target arrays follow.
        mini_batches: indices of the samples of each optimizer step; together all of them, once.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        mini_batches: Sequence[Sequence[int]],
        *,
        num_ranks: int,
        packing: PackingOptions,
    ) -> None:
        prompts = np.array([len(sample.prompt.token_ids) for sample in samples], dtype=np.int64)
        self.num_targets: Ints = np.array([sample.response_length for sample in samples], dtype=np.int64)
        group_ids = np.array([sample.group_id for sample in samples], dtype=np.int64)
        sample_ids = np.array([sample.sample_id for sample in samples], dtype=np.int64)
        unit_ids = np.empty(len(samples), dtype=np.int64)
        plans: list[list[list[Ints]]] = [[] for _ in range(num_ranks)]  # by rank, mini-batch, micro-batch
        for mini_batch in mini_batches:
            chosen = np.sort(np.asarray(mini_batch, dtype=np.int64))
            sizes = (prompts[chosen] + self.num_targets[chosen], prompts[chosen])
            units = prompt_units(*sizes, group_ids[chosen], num_ranks=num_ranks, packing=packing)
            unit_ids[chosen] = units  # mini-batches share no micro-batch, so each may count from 0
            by_rank = plan_micro_batches(*sizes, units, num_ranks=num_ranks, packing=packing)
            for rank, micro_batches in enumerate(by_rank):
                plans[rank].append([chosen[indices] for indices in micro_batches])
        self.rows = [np.sort(np.concatenate(sum(plan, []))) for plan in plans]  # by rank: indices among `samples`
        self.partitions = []
        for rows, plan in zip(self.rows, plans, strict=True):
            groups, places = np.unique(group_ids[rows], return_inverse=True)
            own = [[np.searchsorted(rows, indices).tolist() for indices in micro_batches] for micro_batches in plan]
            ids = {"sample_ids": sample_ids[rows], "unit_ids": unit_ids[rows]}
            self.partitions.append(Partition(groups=groups, group_of_row=places, plan=own, **ids))

    def scatter(self, values: Floats, *, per_row: bool = False) -> list[Floats]:
        """Each rank's part of one number for every target of every sample, or `per_row` for every sample."""
        if per_row:
            return [values[rows] for rows in self.rows]
        parts, starts = [], starts_of(self.num_targets)
        for rows in self.rows:
            lengths = self.num_targets[rows]
            parts.append(np.empty(int(lengths.sum()), dtype=np.float32))
            copy_runs(values, starts[rows], lengths, parts[-1], starts_of(lengths))
        return parts

    def gather(self, parts: Sequence[Floats]) -> Floats:
        """The inverse of `scatter`, of numbers for targets."""
        whole, starts = np.empty(int(self.num_targets.sum()), dtype=np.float32), starts_of(self.num_targets)
        for rows, values in zip(self.rows, parts, strict=True):
            lengths = self.num_targets[rows]
            copy_runs(values, starts_of(lengths), lengths, whole, starts[rows])
        return whole


def rows_of(partition: Partition, tokens: Sequence[GroupTokens]) -> TrainingRows:
    """A rank's rows, with the field `rollout_log_probs`, from the tokens of the partition's groups in their order."""
    starts = [starts_of(group.lengths) for group in tokens]
    ids, log_probs, prompt_lengths = [], [], []
    for number, sample in zip(partition.group_of_row.tolist(), partition.sample_ids.tolist(), strict=True):
        group, first = tokens[number], int(starts[number][sample])
        own = slice(first, first + int(group.lengths[sample]))
        ids += [group.prompt_ids, group.response_ids[own]]
        log_probs.append(group.rollout_log_probs[own])
        prompt_lengths.append(len(group.prompt_ids))
    prompts = np.array(prompt_lengths, dtype=np.int64)
    return TrainingRows(
        input_ids=np.concatenate([np.empty(0, dtype=np.int32), *ids]),
        lengths=prompts + np.array([len(part) for part in log_probs], dtype=np.int64),
        prompt_lengths=prompts,
        unit_ids=partition.unit_ids,
        fields={"rollout_log_probs": np.concatenate([np.empty(0, dtype=np.float32), *log_probs])},
    )


def with_ends(group: GroupTokens, stopped: NDArray[np.bool_], *, eos: int | None) -> GroupTokens:
    """A group as a model of values reads it: the value of a response's last token is the one before its last target.

    So one more token, which nobody reads, comes behind each response; and before it EOS, where the response was stopped
    by another token, since reward models are trained on answers that end with theirs.

    Args:
        stopped: [n_samples], those that a stop token has ended.
        eos: the model's; None where it has none.
    """
    last = group.response_ids[np.cumsum(group.lengths) - 1]
    lengths = group.lengths + 1 + (stopped & (last != eos) if eos is not None else 0)
    ids = np.full(int(lengths.sum()), eos or 0, dtype=np.int32)
    copy_runs(group.response_ids, starts_of(group.lengths), group.lengths, ids, starts_of(lengths))
    unknown = np.zeros(len(ids), dtype=np.float32)
    return replace(group, response_ids=ids, rollout_log_probs=unknown, lengths=lengths)


class RankRows:
    """A rank's rows of the present step, packed once for all passes, and the fields that collect on them.

    Args:
        pack: lays rows of these numbers out in a packed sequence of at least so many positions.
        one_length: all packed sequences of a rank are to be equally long.
    """

    def __init__(
        self,
        partition: Partition,
        tokens: Sequence[GroupTokens],
        pack: Callable[[TrainingRows, Sequence[int], int], MicroBatch],
        *,
        one_length: bool,
    ) -> None:
        self.rows = rows_of(partition, tokens)
        self._packed = [[pack(self.rows, indices, 1) for indices in mini_batch] for mini_batch in partition.plan]
        if one_length:
            longest = max(int(batch.cu_seqlens[-1]) for batches in self._packed for batch in batches)
            self._packed = [[pack(self.rows, indices, longest) for indices in part] for part in partition.plan]

    def batches(self, mini_batch: int | None = None, *, unread: Collection[str] = ()) -> list[MicroBatch]:
        """Packed sequences of one mini-batch with all fields but `unread`, or of the whole step without any but the
        tokens that distributions are over."""
        whole = mini_batch is None
        fields = {n: v for n, v in self.rows.fields.items() if (n == KEPT_TOKENS if whole else n not in unread)}
        rows = replace(self.rows, fields=fields, scalars={} if whole else self.rows.scalars)
        packed = [batch for part in self._packed for batch in part] if mini_batch is None else self._packed[mini_batch]
        return [fill_fields(batch, rows) for batch in packed]

    def keep(self, fields: Mapping[str, Floats], *, scalars: Mapping[str, Floats] | None = None) -> None:
        """Add fields, one number for each target, and scalars, one for each row."""
        self.rows = self.rows.with_fields(fields, scalars=scalars)

    def keep_values(self, name: str, values: TargetValues) -> Floats:
        """Add a field that this rank has computed, one number or k for every target; returns it."""
        field = np.empty((int(self.rows.num_targets.sum()), *values.values.shape[1:]), dtype=np.float32)
        copy_runs(values.values, starts_of(values.lengths), values.lengths, field, values.starts)
        self.keep({name: field})
        return field

    def last_values(self, values: TargetValues) -> Floats:
        """[rows] of what this rank has computed, the number of each row's last target."""
        found = np.empty(len(self.rows), dtype=np.float32)
        ends = np.cumsum(values.lengths) - 1
        found[np.searchsorted(self.rows.target_starts, values.starts)] = values.values[ends]
        return found
