"""The plan's invariants on any rows, its balance, and where groups are cut."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarlhf.data.packing import pack_rows
from megarlhf.data.planning import PackingOptions, members_of, plan_micro_batches, prompt_units
from megarlhf.data.types import TrainingRows
from tests.data.rows import Row, make_rows, packed_length, ragged_rows

ROWS = make_rows([([1, 2, 3], [4, 5], 0), ([7, 8], [9], 1), ([1, 2, 3], [6], 0)])


def plan(rows: TrainingRows, *, num_ranks: int, **options: Any) -> list[list[list[int]]]:
    sizes = rows.lengths, rows.prompt_lengths, rows.unit_ids
    return plan_micro_batches(*sizes, num_ranks=num_ranks, packing=PackingOptions(**options))


def units_of(rows: TrainingRows, *, num_ranks: int, share_prefix: bool = True, **options: Any) -> list[list[int]]:
    sizes, packing = (
        (rows.lengths, rows.prompt_lengths, rows.unit_ids),
        PackingOptions(share_prefix=share_prefix, **options),
    )
    return members_of(prompt_units(*sizes, num_ranks=num_ranks, packing=packing))


@settings(max_examples=100)
@given(ragged_rows(), st.booleans(), st.integers(1, 6), st.integers(0, 40), st.integers(1, 3))
def test_plan_keeps_its_invariants(
    given_rows: list[Row], share_prefix: bool, num_ranks: int, room: int, multiple: int
) -> None:
    rows = make_rows(given_rows)
    units = members_of(rows.unit_ids)
    max_tokens = max(packed_length(rows, unit, share_prefix=share_prefix) for unit in units) + room
    options = {"max_tokens": max_tokens, "share_prefix": share_prefix, "per_rank_multiple": multiple}
    found = plan(rows, num_ranks=num_ranks, **options)
    bins = [micro_batch for rank in found for micro_batch in rank]
    assert sorted(index for micro_batch in bins for index in micro_batch) == list(range(len(rows)))
    assert len(found) == num_ranks and len({len(rank) for rank in found}) == 1
    assert all(rank and len(rank) % multiple == 0 for rank in found)
    for indices in bins:
        assert packed_length(rows, indices, share_prefix=share_prefix) <= max_tokens
        if indices:
            assert len(pack_rows(rows, indices, share_prefix=share_prefix).tokens) <= max_tokens
    for unit in units:
        assert sum(bool(set(unit) & set(indices)) for indices in bins) == 1, "a unit is cut"
    assert sum(not indices for indices in bins) < num_ranks * multiple
    if any(not indices for indices in bins):
        assert len(units) < len(bins)
    assert found == plan(rows, num_ranks=num_ranks, **options)


@settings(max_examples=100)
@given(ragged_rows(), st.integers(1, 6), st.integers(0, 40), st.integers(1, 3))
def test_groups_are_cut_only_where_they_must_be(
    given_rows: list[Row], num_ranks: int, room: int, multiple: int
) -> None:
    rows = make_rows(given_rows)
    max_tokens = int(rows.lengths.max()) - 1 + room
    options = {"max_tokens": max_tokens, "num_ranks": num_ranks, "per_rank_multiple": multiple}
    units = units_of(rows, **options)
    assert sorted(index for unit in units for index in unit) == list(range(len(rows)))
    groups = members_of(rows.unit_ids)
    whole = [group for group in groups if packed_length(rows, group, share_prefix=True) <= max_tokens]
    for unit in units:
        assert len(set(rows.unit_ids[unit])) == 1
        assert packed_length(rows, unit, share_prefix=True) <= max_tokens
    if len(groups) >= num_ranks * multiple and len(whole) == len(groups):
        total = sum(packed_length(rows, group, share_prefix=True) for group in groups)
        if total <= max_tokens * num_ranks * multiple:
            assert sorted(units) == sorted(groups)
    assert len(units) >= min(len(rows), num_ranks * multiple)


def test_groups_stay_whole_and_large_ones_are_cut() -> None:
    rows = make_rows([([1, 2, 3], [4] * 4, group) for group in (0, 0, 0, 1, 1, 1)])
    # A group packs to 2 + 3 * 4 = 14 positions, two of its rows to 10.
    assert plan(rows, num_ranks=2, max_tokens=14, share_prefix=True) == [[[3, 4, 5]], [[0, 1, 2]]]
    assert sorted(units_of(rows, num_ranks=1, max_tokens=13)) == [[0, 1], [2], [3, 4], [5]]
    # One group on two ranks is cut too: each rank needs rows.
    assert sorted(units_of(rows.take([0, 1, 2]), num_ranks=2, max_tokens=99)) == [[0], [1, 2]]
    assert units_of(rows, num_ranks=1, max_tokens=99, share_prefix=False) == [[0], [1], [2], [3], [4], [5]]


def test_members_come_in_order_of_first_appearance() -> None:
    assert members_of(np.array([7, 2, 7, 5, 2, 7])) == [[0, 2, 5], [1, 4], [3]]
    assert members_of(np.array([3])) == [[0]]


def test_plan_is_balanced() -> None:
    """The spike's round robin of groups gave 639 against 901 tokens to two ranks."""
    lengths = [7, 61, 23, 64, 35, 12, 58, 44, 3, 29, 51, 18, 64, 40, 9, 33]
    rows = make_rows([([1] * 20, [2] * response, index) for index, response in enumerate(lengths)])
    found = plan(rows, num_ranks=2, max_tokens=170, share_prefix=False)
    loads = [sum(packed_length(rows, indices, share_prefix=False) for indices in rank) for rank in found]
    assert sum(loads) == sum(lengths) + 19 * 16
    assert abs(loads[0] - loads[1]) <= 0.05 * sum(loads)


def test_a_pair_of_tokens_has_its_price() -> None:
    """One long row costs more than short ones of as many tokens: 24,000 tokens attend to 288 million pairs."""
    rows = make_rows([([1], [2] * 24000, 0), *(([1], [2] * 1000, 1 + i) for i in range(40))])
    found = plan(rows, num_ranks=2, max_tokens=100_000, share_prefix=False)
    (with_long,) = [indices for rank in found for indices in rank if 0 in indices]
    assert with_long == [0] or packed_length(rows, with_long, share_prefix=False) < 30_000


def test_units_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_tokens_per_micro_batch=4; rows \[0, 2\] together have 5 positions"):
        plan(ROWS, num_ranks=1, max_tokens=4, share_prefix=True)
    with pytest.raises(ValueError, match=r"max_tokens_per_micro_batch=1; row 1 alone has 2 positions"):
        plan(make_rows([([7], [9], 0), ([7, 8], [9], 1)]), num_ranks=1, max_tokens=1, share_prefix=True)


def test_fewer_units_than_ranks_leave_ranks_with_padding() -> None:
    found = plan(ROWS, num_ranks=4, max_tokens=9, share_prefix=True)
    assert [len(rank) for rank in found] == [1, 1, 1, 1]
    assert sorted(index for rank in found for indices in rank for index in indices) == [0, 1, 2]


def test_rows_that_do_not_divide_evenly_leave_empty_micro_batches() -> None:
    rows = make_rows([([1, 2], [3, 4], unit) for unit in range(5)])
    found = plan(rows, num_ranks=4, max_tokens=3, share_prefix=True)
    assert [[len(indices) for indices in rank] for rank in found] == [[1, 1], [1, 0], [1, 0], [1, 0]]
