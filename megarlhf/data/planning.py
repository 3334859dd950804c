"""Which rows go together in a micro-batch, and on which data-parallel rank; from their lengths alone."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from megarlhf.data.types import Ints

# A pair of tokens that attend to each other costs 4 * hidden operations a layer, a token 24 * hidden^2 in the matrix
# products: one token equals 6 * hidden pairs. For balance alone, so a hidden size of 2048 stands for all.
_PAIRS_PER_TOKEN = 6 * 2048


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


class _Unit(NamedTuple):
    """Rows that stay together."""

    cost: float  # work, in tokens
    num_tokens: int  # positions when packed
    rows: list[int]


def plan_micro_batches(
    lengths: Ints, prompt_lengths: Ints, unit_ids: Ints, *, num_ranks: int, packing: PackingOptions
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
        lengths, prompt_lengths, unit_ids: [n] of all rows of one optimizer step, at least one, as in TrainingRows.
    Returns:
        [rank][micro-batch] -> row indices, ascending.
    Raises:
        ValueError: a unit that alone exceeds max_tokens.
    """
    max_tokens, step = packing.max_tokens, num_ranks * packing.per_rank_multiple
    units = [_unit(rows, lengths, prompt_lengths, packing) for rows in members_of(unit_ids)]
    for unit in units:
        if unit.num_tokens > max_tokens:
            alone = f"row {unit.rows[0]} alone has" if len(unit.rows) == 1 else f"rows {unit.rows} together have"
            raise ValueError(
                f"max_tokens_per_micro_batch={max_tokens}; {alone} {unit.num_tokens} positions, which are not cut: "
                f"raise it to at least {unit.num_tokens}, or shorten prompts and responses"
            )
    units.sort(key=lambda unit: (-unit.cost, unit.rows))
    num_bins = _fewest_bins(units, max_tokens, step)
    while (bins := _fill_bins(units, num_bins=num_bins, max_tokens=max_tokens)) is None:
        num_bins += step
    return _assign_bins(bins, num_ranks=num_ranks)


def prompt_units(
    lengths: Ints, prompt_lengths: Ints, group_ids: Ints, *, num_ranks: int, packing: PackingOptions
) -> Ints:
    """Units of rows: each row alone, or with share_prefix those of one prompt, cut where they must be.

    A group is cut where its next row would not fit into a micro-batch any more, and halved where there would be fewer
    units than micro-batches. Each part has its own copy of the prompt.

    Args:
        group_ids: [n] equal for the rows with one prompt; the others as in `plan_micro_batches`.
    Returns:
        [n] unit_ids.
    """
    if not packing.share_prefix:
        return np.arange(len(lengths))
    units: list[_Unit] = []
    targets = lengths - prompt_lengths
    for group in members_of(group_ids):
        fits = packing.max_tokens - (int(prompt_lengths[group[0]]) - 1)
        part, num_targets = [group[0]], int(targets[group[0]])
        for row in group[1:]:
            if num_targets + int(targets[row]) > fits:
                units.append(_unit(part, lengths, prompt_lengths, packing))
                part, num_targets = [], 0
            part.append(row)
            num_targets += int(targets[row])
        units.append(_unit(part, lengths, prompt_lengths, packing))
    at_least = _fewest_bins(units, packing.max_tokens, num_ranks * packing.per_rank_multiple)
    heap = [_costliest_first(unit) for unit in units]
    heapq.heapify(heap)
    while len(heap) < at_least and len(heap[0][1]) > 1:
        _, rows = heapq.heappop(heap)
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            heapq.heappush(heap, _costliest_first(_unit(half, lengths, prompt_lengths, packing)))
    unit_ids = np.empty(len(lengths), dtype=np.int64)
    for number, (_, rows) in enumerate(heap):
        unit_ids[rows] = number
    return unit_ids


def _costliest_first(unit: _Unit) -> tuple[float, list[int]]:
    """Key of a unit that may be halved, behind all others for one that may not."""
    return -unit.cost if len(unit.rows) > 1 else 0.0, unit.rows


def members_of(ids: Ints) -> list[list[int]]:
    """Indices of equal ids, ascending, in order of first appearance."""
    _, first, numbers = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first[numbers], kind="stable")
    changes = np.flatnonzero(np.diff(ids[order])) + 1
    return [part.tolist() for part in np.split(order, changes)]


def _unit(rows: list[int], lengths: Ints, prompt_lengths: Ints, packing: PackingOptions) -> _Unit:
    prefix = int(prompt_lengths[rows[0]]) - 1 if packing.share_prefix else 0
    num_tokens, pairs = prefix, prefix * (prefix + 1) / 2
    for row in rows:
        own = int(lengths[row]) - int(prompt_lengths[row] if packing.share_prefix else 1)
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
