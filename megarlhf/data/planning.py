"""Which rows go together in a micro-batch, and on which data-parallel rank; from their lengths alone."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megarlhf.data.types import Ints

# A pair of tokens that attend to each other costs 4 * hidden operations a layer, a token 24 * hidden^2 in the matrix
# products: one token equals 6 * hidden pairs. For balance alone, so a hidden size of 2048 stands for all.
_PAIRS_PER_TOKEN = 6 * 2048


class _Unit(NamedTuple):
    """Rows that stay together."""

    cost: float  # work, in tokens
    num_tokens: int  # positions when packed
    rows: list[int]


def plan_micro_batches(
    lengths: Ints,
    prompt_lengths: Ints,
    unit_ids: Ints,
    *,
    num_ranks: int,
    max_tokens: int,
    share_prefix: bool,
    per_rank_multiple: int = 1,
) -> list[list[list[int]]]:
    """Assign rows to data-parallel ranks and, within a rank, to micro-batches.

    Invariants:
        1. Every row is in exactly one micro-batch.
        2. Every rank has the same number of micro-batches, at least one and a multiple of per_rank_multiple.
        3. No micro-batch packs to more than max_tokens, padding not counted.
        4. The rows of a unit are in one micro-batch.
        5. Only where there are fewer units than micro-batches (fewer than num_ranks * per_rank_multiple, or too long to
           go together and no multiple of it) are some micro-batches empty, fewer than that product: `pack_rows` makes
           padding of them.
        6. The plan is a function of its arguments alone.

    Balance: units go by falling cost (tokens, and pairs of tokens for attention) to the cheapest micro-batch
    that has room, then micro-batches to the cheapest rank (LPT rule, Graham 1969).

    Args:
        lengths, prompt_lengths, unit_ids: [n] of all rows of one optimizer step, as in TrainingRows.
        max_tokens: most positions of a micro-batch.
        share_prefix: whether the rows of a unit share their prompt's computation.
        per_rank_multiple: what the interleaved pipeline schedule divides a rank's micro-batches by.
    Returns:
        [rank][micro-batch] -> row indices, ascending.
    Raises:
        ValueError: no rows, or a unit that alone exceeds max_tokens.
    """
    if not len(lengths):
        raise ValueError("no rows to plan: there is nothing to train or evaluate on")
    units = [_unit(rows, lengths, prompt_lengths, share_prefix=share_prefix) for rows in members_of(unit_ids)]
    for unit in units:
        if unit.num_tokens > max_tokens:
            alone = f"row {unit.rows[0]} alone has" if len(unit.rows) == 1 else f"rows {unit.rows} together have"
            raise ValueError(
                f"max_tokens_per_micro_batch={max_tokens}; {alone} {unit.num_tokens} positions, which are not cut: "
                f"raise it to at least {unit.num_tokens}, or shorten prompts and responses"
            )
    units.sort(key=lambda unit: (-unit.cost, unit.rows))
    step = num_ranks * per_rank_multiple
    num_bins = _fewest_bins(units, max_tokens, step)
    while (bins := _fill_bins(units, num_bins=num_bins, max_tokens=max_tokens)) is None:
        num_bins += step
    return _assign_bins(bins, num_ranks=num_ranks)


def prompt_units(
    lengths: Ints,
    prompt_lengths: Ints,
    group_ids: Ints,
    *,
    num_ranks: int,
    max_tokens: int,
    per_rank_multiple: int = 1,
) -> Ints:
    """Units of rows that share a prompt's computation: groups, cut where they must be.

    A group is cut where its next row would not fit into a micro-batch any more, and halved where there would be fewer
    units than micro-batches. Each part has its own copy of the prompt.

    Args:
        group_ids: [n] equal for the rows with one prompt; the others as in `plan_micro_batches`.
    Returns:
        [n] unit_ids.
    """
    units: list[_Unit] = []
    targets = lengths - prompt_lengths
    for group in members_of(group_ids):
        prefix = int(prompt_lengths[group[0]]) - 1
        part, num_tokens = [group[0]], prefix + int(targets[group[0]])
        for row in group[1:]:
            if num_tokens + int(targets[row]) > max_tokens:
                units.append(_unit(part, lengths, prompt_lengths, share_prefix=True))
                part, num_tokens = [], prefix
            part.append(row)
            num_tokens += int(targets[row])
        units.append(_unit(part, lengths, prompt_lengths, share_prefix=True))
    single = [unit for unit in units if len(unit.rows) == 1]
    several = [(-unit.cost, unit.rows, unit) for unit in units if len(unit.rows) > 1]
    heapq.heapify(several)
    at_least = _fewest_bins(units, max_tokens, num_ranks * per_rank_multiple)
    while several and len(single) + len(several) < at_least:
        rows = heapq.heappop(several)[1]
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            unit = _unit(half, lengths, prompt_lengths, share_prefix=True)
            if len(half) == 1:
                single.append(unit)
            else:
                heapq.heappush(several, (-unit.cost, half, unit))
    unit_ids = np.empty(len(lengths), dtype=np.int64)
    for number, unit in enumerate([*single, *(unit for _, _, unit in several)]):
        unit_ids[unit.rows] = number
    return unit_ids


def members_of(ids: Ints) -> list[list[int]]:
    """Indices of equal ids, ascending, in order of first appearance."""
    _, first, numbers = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first[numbers], kind="stable")
    changes = np.flatnonzero(np.diff(ids[order])) + 1
    return [part.tolist() for part in np.split(order, changes)]


def packed_length(lengths: Ints, prompt_lengths: Ints, unit_ids: Ints, *, share_prefix: bool) -> int:
    """Positions that rows take when packed together, without padding."""
    units = members_of(unit_ids) if len(lengths) else []
    return sum(_unit(rows, lengths, prompt_lengths, share_prefix=share_prefix).num_tokens for rows in units)


def _unit(rows: list[int], lengths: Ints, prompt_lengths: Ints, *, share_prefix: bool) -> _Unit:
    prefix = int(prompt_lengths[rows[0]]) - 1 if share_prefix else 0
    num_tokens, pairs = prefix, prefix * (prefix + 1) / 2
    for row in rows:
        own = int(lengths[row]) - int(prompt_lengths[row] if share_prefix else 1)
        num_tokens += own
        pairs += prefix * own + own * (own + 1) / 2
    return _Unit(num_tokens + pairs / _PAIRS_PER_TOKEN, num_tokens, rows)


def _fewest_bins(units: Sequence[_Unit], max_tokens: int, multiple: int) -> int:
    return -(-sum(unit.num_tokens for unit in units) // (max_tokens * multiple)) * multiple


def _fill_bins(units: Sequence[_Unit], *, num_bins: int, max_tokens: int) -> list[_Unit] | None:
    """Put units, costliest first, into the cheapest bin with room; None where one fits nowhere."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    lengths, costs = [0] * num_bins, [0.0] * num_bins
    heap = [(0.0, number) for number in range(num_bins)]
    for unit in units:
        full = []
        while heap and lengths[heap[0][1]] + unit.num_tokens > max_tokens:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        _, number = heapq.heappop(heap)
        bins[number] += unit.rows
        lengths[number] += unit.num_tokens
        costs[number] += unit.cost
        for entry in (*full, (costs[number], number)):
            heapq.heappush(heap, entry)
    return [_Unit(costs[number], lengths[number], sorted(rows)) for number, rows in enumerate(bins)]


def _assign_bins(bins: Sequence[_Unit], *, num_ranks: int) -> list[list[list[int]]]:
    """Assign bins, costliest first, to the cheapest rank that does not have its number yet."""
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    heap = [(0.0, rank) for rank in range(num_ranks)]
    for one in sorted(bins, key=lambda one: (one.cost, one.rows), reverse=True):
        load, rank = heapq.heappop(heap)
        ranks[rank].append(one.rows)
        if len(ranks[rank]) < len(bins) // num_ranks:
            heapq.heappush(heap, (load + one.cost, rank))
    return ranks
