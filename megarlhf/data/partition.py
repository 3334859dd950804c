"""A step's rows on the data-parallel ranks of a role: the driver partitions them, each rank keeps its own.

The driver knows lengths alone. Tokens go from the engines that generated them to the ranks that train on them; what
later passes compute stays with the rows, and only new fields follow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megarlhf.data.packing import fill_fields
from megarlhf.data.planning import plan_micro_batches, prompt_units
from megarlhf.data.types import (
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
class PackingOptions:
    """How rows become micro-batches."""

    max_tokens: int  # packed tokens in a micro-batch, at most
    share_prefix: bool  # compute the prompt of a unit of rows once
    per_rank_multiple: int = 1  # of a rank's micro-batches
    one_length: bool = False  # all packed sequences of a rank are equally long

    def for_pipeline(self, pp_size: int, vpp_size: int) -> "PackingOptions":
        """With what the pipeline asks for: its interleaved schedule takes pp_size sequences of one length at a time."""
        return self if vpp_size == 1 else replace(self, per_rank_multiple=pp_size, one_length=True)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A data-parallel rank\'s rows of a step, without their tokens."""

    groups: Ints  # [g] group_ids whose tokens it needs, ascending
    group_of_row: Ints  # [n] place in `groups` of each of its rows
    sample_ids: Ints  # [n]
    unit_ids: Ints  # [n]
    plan: list[list[list[int]]]  # [mini-batch][micro-batch] -> its own row numbers; a mini-batch is one optimizer step


class DataParallelSplit:
    """A step\'s rows over the data-parallel ranks of a role.

    Args:
        samples: of the step, in an order that all its per-target arrays follow.
        mini_batches: indices of the samples of each optimizer step; together all of them, once.
        num_ranks: data-parallel size.
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
        unit_ids = np.arange(len(samples))
        plans: list[list[list[list[int]]]] = [[] for _ in range(num_ranks)]  # by rank, mini-batch, micro-batch
        for mini_batch in mini_batches:
            chosen = np.sort(np.asarray(mini_batch, dtype=np.int64))
            sizes = (prompts[chosen] + self.num_targets[chosen], prompts[chosen])
            multiple = packing.per_rank_multiple
            if packing.share_prefix:
                units = prompt_units(
                    *sizes,
                    group_ids[chosen],
                    num_ranks=num_ranks,
                    max_tokens=packing.max_tokens,
                    per_rank_multiple=multiple,
                )
                unit_ids[chosen] = units  # mini-batches share no micro-batch, so each may count from 0
            by_rank = plan_micro_batches(
                *sizes,
                unit_ids[chosen],
                num_ranks=num_ranks,
                max_tokens=packing.max_tokens,
                share_prefix=packing.share_prefix,
                per_rank_multiple=multiple,
            )
            for rank, bins in enumerate(by_rank):
                plans[rank].append([chosen[indices].tolist() for indices in bins])
        self.rows = [np.sort(_flat(plan)) for plan in plans]  # by rank: indices among `samples`
        self.partitions = [
            _partition(rows, plan, group_ids, sample_ids, unit_ids) for rows, plan in zip(self.rows, plans, strict=True)
        ]

    def scatter(self, values: Floats, *, per_row: bool = False) -> list[Floats]:
        """Each rank's part of one number for every target of every sample, or `per_row` for every sample."""
        if per_row:
            return [values[rows] for rows in self.rows]
        empty = values[:0]
        return [np.concatenate([empty, *(values[a:b] for a, b in self._runs(rows))]) for rows in self.rows]

    def gather(self, parts: Sequence[Floats]) -> Floats:
        """The inverse of `scatter`, of numbers for targets."""
        whole = np.empty(int(self.num_targets.sum()), dtype=np.float32)
        for rows, values in zip(self.rows, parts, strict=True):
            first = 0
            for start, stop in self._runs(rows):
                whole[start:stop] = values[first : first + stop - start]
                first += stop - start
        return whole

    def _runs(self, rows: Ints) -> list[tuple[int, int]]:
        """First and past the last target of each of these samples."""
        starts = starts_of(self.num_targets)[rows]
        return list(zip(starts.tolist(), (starts + self.num_targets[rows]).tolist(), strict=True))


def _flat(plan: Sequence[Sequence[Sequence[int]]]) -> Ints:
    return np.array([row for mini_batch in plan for micro_batch in mini_batch for row in micro_batch], dtype=np.int64)


def _partition(rows: Ints, plan: list[list[list[int]]], group_ids: Ints, sample_ids: Ints, unit_ids: Ints) -> Partition:
    groups, places = np.unique(group_ids[rows], return_inverse=True)
    own = [[np.searchsorted(rows, micro_batch).tolist() for micro_batch in mini_batch] for mini_batch in plan]
    return Partition(groups=groups, group_of_row=places, sample_ids=sample_ids[rows], unit_ids=unit_ids[rows], plan=own)


def rows_of(partition: Partition, tokens: Sequence[GroupTokens]) -> TrainingRows:
    """A rank's rows, with the field `rollout_log_probs`.

    Args:
        tokens: of the partition's groups, in their order.
    """
    counts = partition.group_of_row, partition.sample_ids
    prompts = np.array([len(group.prompt_ids) for group in tokens], dtype=np.int64)
    starts = [starts_of(group.lengths) for group in tokens]
    ids, log_probs, lengths = [], [], []
    for group, sample in zip(*(values.tolist() for values in counts), strict=True):
        first, length = int(starts[group][sample]), int(tokens[group].lengths[sample])
        ids += [tokens[group].prompt_ids, tokens[group].response_ids[first : first + length]]
        log_probs.append(tokens[group].rollout_log_probs[first : first + length])
        lengths.append(length)
    prompt_lengths = prompts[partition.group_of_row] if len(lengths) else np.empty(0, dtype=np.int64)
    return TrainingRows(
        input_ids=np.concatenate(ids) if ids else np.empty(0, dtype=np.int32),
        lengths=prompt_lengths + np.array(lengths, dtype=np.int64),
        prompt_lengths=prompt_lengths,
        unit_ids=partition.unit_ids,
        fields={"rollout_log_probs": np.concatenate(log_probs) if log_probs else np.empty(0, dtype=np.float32)},
    )


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

    def batches(self, mini_batch: int | None = None) -> list[MicroBatch]:
        """Packed sequences of one mini-batch with all fields, or of the whole step without any."""
        if mini_batch is None:
            return [batch for batches in self._packed for batch in batches]
        return [fill_fields(batch, self.rows) for batch in self._packed[mini_batch]]

    def keep(self, fields: Mapping[str, Floats], *, scalars: Mapping[str, Floats] | None = None) -> None:
        """Add fields, one number for each target, and scalars, one for each row."""
        self.rows = self.rows.with_fields(fields, scalars=scalars)

    def keep_values(self, name: str, values: TargetValues) -> Floats:
        """Add a field that this rank has computed, for every target; returns it."""
        field, first = np.empty(int(self.rows.num_targets.sum()), dtype=np.float32), 0
        for start, length in zip(values.starts.tolist(), values.lengths.tolist(), strict=True):
            field[start : start + length] = values.values[first : first + length]
            first += length
        self.keep({name: field})
        return field
