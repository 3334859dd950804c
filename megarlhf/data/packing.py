"""Micro-batches: which rows go together on which rank, and how they lie in one line of tokens.

Two layouts. Alone, a row is one segment of all its tokens but the last, each predicting the next. Shared, rows of one
group use one copy of their prompt: a segment of the prompt but for its last token, then a segment per row of that
last token and the response but for its own last. So every target has a position of its own, and a group of samples
costs (prompt_length - 1) + the sum of their num_targets positions.
"""

import heapq
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megarlhf.data.types import MicroBatch, TrainingRow

# A pair of tokens that attend to each other costs 4 * hidden operations a layer, a token 24 * hidden^2 in the matrix
# products: one token equals 6 * hidden pairs. For balance alone, so a hidden size of 2048 stands for all.
_PAIRS_PER_TOKEN = 6 * 2048


def plan_micro_batches(
    rows: Sequence[TrainingRow], *, num_ranks: int, max_tokens: int, share_prefix: bool, per_rank_multiple: int = 1
) -> list[list[list[int]]]:
    """Deal rows to data-parallel ranks and, within a rank, to micro-batches.

    Invariants:
        1. Every row is in exactly one micro-batch.
        2. Every rank has the same number of micro-batches, at least one and a multiple of per_rank_multiple.
        3. No micro-batch packs to more than max_tokens, padding not counted.
        4. With share_prefix the rows of a group stay together as long as they fit; a group that does not fit is cut
           into parts, each with its own copy of the prompt. A group is also cut where there are fewer groups than
           micro-batches.
        5. Only where there are fewer rows than micro-batches (fewer than num_ranks * per_rank_multiple, or too long to
           go together and no multiple of it) are some micro-batches empty, fewer than that product: `pack_rows` makes
           padding of them.
        6. The plan is a function of its arguments alone, and every rank computes the whole of it.

    Balance: units of rows that stay together are dealt by falling cost (tokens, and pairs of tokens for attention) to
    the cheapest micro-batch that has room, then micro-batches to the cheapest rank (LPT rule, Graham 1969).

    Args:
        rows: all rows of one optimizer step.
        max_tokens: most positions of a micro-batch.
        share_prefix: whether rows with one group_id share their prompt's computation.
        per_rank_multiple: what the interleaved pipeline schedule divides a rank's micro-batches by.
    Returns:
        [rank][micro-batch] -> row indices, ascending.
    Raises:
        ValueError: no rows, or a row that alone exceeds max_tokens.
    """
    if not rows:
        raise ValueError("no rows to plan: there is nothing to train or evaluate on")
    for index, row in enumerate(rows):
        _check_row(row, index)
        length = packed_length(rows, [index], share_prefix=share_prefix)
        if length > max_tokens:
            raise ValueError(
                f"max_tokens_per_micro_batch={max_tokens}; row {index} alone has {length} positions and a row is not "
                f"cut: raise it to at least {length}, or shorten prompts and responses"
            )
    units = _make_units(rows, max_tokens=max_tokens, share_prefix=share_prefix)
    total = sum(packed_length(rows, unit, share_prefix=share_prefix) for unit in units)
    step = num_ranks * per_rank_multiple
    num_bins = _round_up(-(-total // max_tokens), step)
    while True:
        units = _cut_units(rows, units, at_least=num_bins, share_prefix=share_prefix)
        bins = _fill_bins(rows, units, num_bins=num_bins, max_tokens=max_tokens, share_prefix=share_prefix)
        if bins is not None:
            return _deal_bins(rows, bins, num_ranks=num_ranks, share_prefix=share_prefix)
        num_bins += step


def packed_length(rows: Sequence[TrainingRow], indices: Sequence[int], *, share_prefix: bool) -> int:
    """Positions that rows take when packed together, without padding."""
    return sum(
        rows[group[0]].prompt_length - 1 + sum(rows[index].num_targets for index in group)
        for group in _group(rows, indices, share_prefix=share_prefix)
    )


def pack_rows(
    rows: Sequence[TrainingRow],
    indices: Sequence[int],
    *,
    share_prefix: bool,
    pad_to_multiple: int = 1,
    context_size: int = 1,
    min_length: int = 1,
) -> MicroBatch:
    """Lay rows out in one line of tokens.

    Padding, up to a multiple of `pad_to_multiple`, is a last segment of token 0 without targets; it attends to itself
    alone. Without any indices the whole line is such padding. Under context parallelism each segment is padded as
    well, at its end, to a multiple of the number of its chunks.

    Args:
        rows: all rows of the plan; the field names of the first are those of the micro-batch.
        indices: the rows to pack, in any order; those of one group are brought together.
        share_prefix: lay out rows of one group behind one copy of their prompt, where they have two prompt tokens.
        pad_to_multiple: what sequence parallelism divides a rank's part of the line by.
        min_length: pad the line at least to this many positions.
        context_size: ranks that are to share the line; without share_prefix only (see parallel/context.py).
    Returns:
        Line of t positions; fields are 0 outside the targets.
    Raises:
        ValueError: rows with different field names, or a field that is not [num_targets].
    """
    names = list(rows[0].fields)
    for index in indices:
        _check_row(rows[index], index)
        _check_fields(rows[index], index, names)
    assert context_size == 1 or not share_prefix, "segments that share a prompt are not cut over context ranks"
    line = _Line(1 if context_size == 1 else 2 * context_size)
    for group in _group(rows, indices, share_prefix=share_prefix):
        prefix, start = None, 0
        if len(group) > 1 and rows[group[0]].prompt_length >= 2:
            start = rows[group[0]].prompt_length - 1
            prefix = line.add(rows[group[0]].input_ids[: start + 1], position=0, prefix=None)
        for index in group:
            line.add(rows[index].input_ids[start:], position=start, prefix=prefix)
            stop = line.end_of_last
            line.rows.append((index, stop - rows[index].num_targets, stop))
    multiple = math.lcm(line.segment_multiple, pad_to_multiple * context_size)
    padding = _round_up(max(len(line.tokens), min_length), multiple) - len(line.tokens)
    if padding:
        line.add((0,) * (padding + 1), position=0, prefix=None)
    return line.to_micro_batch(rows, names)


def unpack(micro_batch: MicroBatch, values: Tensor) -> dict[int, Tensor]:
    """Values of each row's targets, such as log-probs, out of values of the whole line.

    Args:
        values: [t] of any type.
    Returns:
        Row index -> [num_targets], views of `values`.
    """
    length = int(micro_batch.cu_seqlens[-1])
    assert values.shape == (length,), f"values {list(values.shape)} of a line of {length}"
    return {index: values[start:stop] for index, start, stop in micro_batch.rows}


class _Line:
    """A line of tokens that grows by segments, each padded to a multiple."""

    def __init__(self, segment_multiple: int) -> None:
        self.segment_multiple = segment_multiple
        self.end_of_last = 0  # of the last segment, without its padding
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self.positions: list[int] = []
        self.boundaries = [0]
        self.prefixes: list[int | None] = []
        self.rows: list[tuple[int, int, int]] = []

    def add(self, run: Sequence[int], *, position: int, prefix: int | None) -> int:
        """Append a segment in which each token of the run predicts the next; returns the segment's number."""
        self.tokens += run[:-1]
        self.targets += run[1:]
        self.end_of_last = len(self.tokens)
        length = _round_up(len(run) - 1, self.segment_multiple)
        padding = [0] * (length - (len(run) - 1))
        self.tokens += padding
        self.targets += padding
        self.positions += range(position, position + length)
        self.boundaries.append(len(self.tokens))
        self.prefixes.append(prefix)
        return len(self.prefixes) - 1

    def to_micro_batch(self, rows: Sequence[TrainingRow], names: Sequence[str]) -> MicroBatch:
        target_mask = torch.zeros(len(self.tokens), dtype=torch.bool)
        fields = {name: torch.zeros(len(self.tokens)) for name in names}
        for index, start, stop in self.rows:
            target_mask[start:stop] = True
            for name, line in fields.items():
                line[start:stop] = rows[index].fields[name]
        return MicroBatch(
            tokens=torch.tensor(self.tokens),
            targets=torch.tensor(self.targets),
            position_ids=torch.tensor(self.positions),
            cu_seqlens=torch.tensor(self.boundaries, dtype=torch.int32),
            prefix_segments=tuple(self.prefixes),
            target_mask=target_mask,
            fields=fields,
            rows=tuple(self.rows),
        )


def _check_row(row: TrainingRow, index: int) -> None:
    assert 1 <= row.prompt_length < len(row.input_ids), f"row {index} has no prompt token or no target"


def _check_fields(row: TrainingRow, index: int, names: Sequence[str]) -> None:
    if row.fields.keys() != set(names):
        raise ValueError(f"row {index} has fields {sorted(row.fields)}, row 0 {sorted(names)}; all rows have the same")
    for name, field in row.fields.items():
        if field.shape != (row.num_targets,):
            raise ValueError(f"row {index}: field {name} is {list(field.shape)}, its {row.num_targets} targets are not")


def _group(rows: Sequence[TrainingRow], indices: Sequence[int], *, share_prefix: bool) -> list[list[int]]:
    """Runs of indices that share a prompt, in order of first appearance; each row alone without sharing."""
    if not share_prefix:
        return [[index] for index in indices]
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(rows[index].group_id, []).append(index)
    for group_id, group in groups.items():
        prompts = {rows[index].input_ids[: rows[index].prompt_length] for index in group}
        assert len(prompts) == 1, f"rows {group} of group {group_id} begin with different prompts"
    return list(groups.values())


def _cost(rows: Sequence[TrainingRow], indices: Sequence[int], *, share_prefix: bool) -> float:
    """Work of packed rows, in tokens."""
    cost = 0.0
    for group in _group(rows, indices, share_prefix=share_prefix):
        prefix = rows[group[0]].prompt_length - 1
        own = [rows[index].num_targets for index in group]
        pairs = prefix * (prefix + 1) / 2 + sum(prefix * length + length * (length + 1) / 2 for length in own)
        cost += prefix + sum(own) + pairs / _PAIRS_PER_TOKEN
    return cost


def _make_units(rows: Sequence[TrainingRow], *, max_tokens: int, share_prefix: bool) -> list[list[int]]:
    """Rows that stay together: each alone, or groups cut where the next row would not fit any more."""
    units = []
    for group in _group(rows, range(len(rows)), share_prefix=share_prefix):
        prefix = rows[group[0]].prompt_length - 1
        unit, length = [group[0]], prefix + rows[group[0]].num_targets
        for index in group[1:]:
            if length + rows[index].num_targets > max_tokens:
                units.append(unit)
                unit, length = [], prefix
            unit.append(index)
            length += rows[index].num_targets
        units.append(unit)
    return units


def _cut_units(
    rows: Sequence[TrainingRow], units: Sequence[list[int]], *, at_least: int, share_prefix: bool
) -> list[list[int]]:
    """Halve the costliest units of several rows until there are enough units or only single rows."""
    single = [unit for unit in units if len(unit) == 1]
    several = [(-_cost(rows, unit, share_prefix=share_prefix), unit) for unit in units if len(unit) > 1]
    heapq.heapify(several)
    while several and len(single) + len(several) < at_least:
        _, unit = heapq.heappop(several)
        for half in (unit[: len(unit) // 2], unit[len(unit) // 2 :]):
            if len(half) == 1:
                single.append(half)
            else:
                heapq.heappush(several, (-_cost(rows, half, share_prefix=share_prefix), half))
    return single + [unit for _, unit in several]


def _fill_bins(
    rows: Sequence[TrainingRow], units: Sequence[list[int]], *, num_bins: int, max_tokens: int, share_prefix: bool
) -> list[list[int]] | None:
    """Put units, costliest first, into the cheapest bin with room; None where one fits nowhere."""
    costs = {unit[0]: _cost(rows, unit, share_prefix=share_prefix) for unit in units}
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    lengths = [0] * num_bins
    heap = [(0.0, number) for number in range(num_bins)]
    for unit in sorted(units, key=lambda unit: (-costs[unit[0]], unit)):
        length = packed_length(rows, unit, share_prefix=share_prefix)
        full = []
        while heap and lengths[heap[0][1]] + length > max_tokens:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, number = heapq.heappop(heap)
        bins[number] += unit
        lengths[number] += length
        for entry in (*full, (cost + costs[unit[0]], number)):
            heapq.heappush(heap, entry)
    return [sorted(indices) for indices in bins]


def _deal_bins(
    rows: Sequence[TrainingRow], bins: Sequence[list[int]], *, num_ranks: int, share_prefix: bool
) -> list[list[list[int]]]:
    """Deal bins, costliest first, to the cheapest rank that does not have its number yet."""
    costed = sorted(((_cost(rows, indices, share_prefix=share_prefix), indices) for indices in bins), reverse=True)
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    heap = [(0.0, rank) for rank in range(num_ranks)]
    for cost, indices in costed:
        load, rank = heapq.heappop(heap)
        ranks[rank].append(indices)
        if len(ranks[rank]) < len(bins) // num_ranks:
            heapq.heappush(heap, (load + cost, rank))
    return ranks


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
