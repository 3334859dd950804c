"""Packing: both layouts by hand, and what every target of any rows sees."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarlhf.data.packing import fill_fields, gather_targets, join_values, pack_rows
from megarlhf.data.types import MicroBatch, TrainingRows, starts_of, training_rows
from tests.data.rows import Row, make_rows, packed_length, ragged_rows

# Two samples of one prompt and one of another.
ROWS = make_rows([([1, 2, 3], [4, 5], 0), ([7, 8], [9], 1), ([1, 2, 3], [6], 0)], scales=[1.0, 100.0, 10.0])


def pack(rows: TrainingRows, indices: list[int], **options: object) -> MicroBatch:
    return fill_fields(pack_rows(rows, indices, **options), rows)  # type: ignore[arg-type]


def spans_of(batch: MicroBatch) -> dict[int, tuple[int, int]]:
    """Row -> first and past the last position of its targets in the line."""
    places = batch.places
    stops = places.positions + places.lengths
    return dict(zip(places.rows.tolist(), zip(places.positions.tolist(), stops.tolist(), strict=True), strict=True))


def test_layout_of_rows_alone() -> None:
    batch = pack(ROWS, [0, 2], share_prefix=False)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 1, 2, 3]
    assert batch.targets.tolist() == [2, 3, 4, 5, 2, 3, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.prefix_segments == (None, None)
    assert batch.target_mask.tolist() == [False, False, True, True, False, False, True]
    assert batch.fields["advantages"].tolist() == [0, 0, 1, 2, 0, 0, 10]
    assert batch.row_ids.tolist() == [-1, -1, 0, 0, -1, -1, 2]
    assert batch.places.positions.tolist() == [2, 6] and batch.places.lengths.tolist() == [2, 1]
    assert batch.places.starts.tolist() == [0, 3] and batch.places.rows.tolist() == [0, 2]


def test_layout_with_a_shared_prompt_and_padding() -> None:
    batch = pack(ROWS, [0, 1, 2], share_prefix=True, pad_to_multiple=5)
    #                                prompt  row 0   row 2  row 1   padding
    assert batch.tokens.tolist() == [1, 2] + [3, 4] + [3] + [7, 8] + [0, 0, 0]
    assert batch.targets.tolist() == [2, 3] + [4, 5] + [6] + [8, 9] + [0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1] + [2, 3] + [2] + [0, 1] + [0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 5, 7, 10]
    assert batch.prefix_segments == (None, 0, 0, None, None)
    assert batch.target_mask.tolist() == [False, False, True, True, True, False, True, False, False, False]
    assert batch.fields["advantages"].tolist() == [0, 0, 1, 2, 10, 0, 100, 0, 0, 0]
    assert spans_of(batch) == {0: (2, 4), 2: (4, 5), 1: (6, 7)}
    assert (batch.tokens.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert (batch.fields["advantages"].dtype, batch.target_mask.dtype) == (torch.float32, torch.bool)
    found = gather_targets(batch, batch.targets)
    assert dict(zip(found.indices.tolist(), found.values.tolist(), strict=True)) == {0: 4, 1: 5, 2: 9, 3: 6}


def test_a_loss_mask_and_scalars_and_fields_of_several_numbers() -> None:
    rows = replace(ROWS, loss_mask=np.array([False, True, True, True]))
    top = np.arange(8, dtype=np.float32).reshape(4, 2)
    rows = rows.with_fields({"top": top}, scalars={"weights": np.array([0.5, 0.25, 0.125], dtype=np.float32)})
    batch = pack(rows, [0, 2], share_prefix=False)
    assert batch.target_mask.tolist() == [False, False, False, True, False, False, True]
    assert batch.fields["weights"].tolist() == [0, 0, 0.5, 0.5, 0, 0, 0.125]
    assert batch.fields["top"][[2, 3, 6]].tolist() == [[0, 1], [2, 3], [6, 7]] and batch.fields["top"].shape == (7, 2)
    assert len(gather_targets(batch, batch.targets).values) == 3, "outputs come for every target"


def test_prompt_of_one_token_is_not_shared() -> None:
    batch = pack(make_rows([([1], [2, 3], 0), ([1], [4], 0)]), [0, 1], share_prefix=True)
    assert batch.tokens.tolist() == [1, 2, 1]
    assert batch.prefix_segments == (None, None)


def test_no_rows_are_a_line_of_padding() -> None:
    batch = pack(ROWS, [], share_prefix=True, pad_to_multiple=4)
    assert batch.tokens.tolist() == [0, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 4]
    assert batch.fields["advantages"].tolist() == [0, 0, 0, 0]
    assert not batch.target_mask.any() and batch.row_ids.tolist() == [-1] * 4
    assert batch.prefix_segments == (None,) and not len(gather_targets(batch, batch.targets).indices)
    assert pack(ROWS, [], share_prefix=False).tokens.tolist() == [0]
    assert not len(join_values([]).values)


def test_what_does_not_fit_its_rows_is_refused() -> None:
    with pytest.raises(AssertionError, match="advantages has 3 values for 4"):
        ROWS.with_fields({"advantages": np.zeros(3, dtype=np.float32)})
    with pytest.raises(AssertionError, match="weights has 4 values for 3"):
        ROWS.with_fields({}, scalars={"weights": np.zeros(4, dtype=np.float32)})
    with pytest.raises(AssertionError, match="advantages has one number for each target"):
        training_rows([[1, 2], [1, 2, 3]], [1, 1], fields={"advantages": [[0.0], [0.0]]})
    with pytest.raises(AssertionError, match="a prompt token and a target"):
        training_rows([[1, 2], [1, 2]], [1, 2])
    with pytest.raises(AssertionError, match="different prompts"):
        pack(make_rows([([1, 2], [3], 0), ([1, 3], [3], 0)]), [0, 1], share_prefix=True)
    with pytest.raises(AssertionError, match="different prompts"):
        pack(make_rows([([1, 2], [3], 0), ([1, 2, 3], [3], 0)]), [0, 1], share_prefix=True)


@given(ragged_rows(), st.data())
def test_taken_rows_keep_all_that_is_theirs(rows: list[Row], data: st.DataObject) -> None:
    order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6, unique=True))
    scales = [10.0 ** (index % 5) + index for index in range(len(rows))]
    whole = make_rows(rows, scales=scales).with_fields({}, scalars={"weights": np.array(scales, dtype=np.float32)})
    whole = replace(whole, loss_mask=whole.fields["advantages"] > 3)
    expected = make_rows([rows[i] for i in order], scales=[scales[i] for i in order])
    found = whole.take(order)
    for name in ("input_ids", "lengths", "prompt_lengths", "unit_ids"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    assert found.fields["advantages"].tolist() == expected.fields["advantages"].tolist()
    assert found.loss_mask is not None and found.loss_mask.tolist() == (found.fields["advantages"] > 3).tolist()
    assert found.scalars["weights"].tolist() == [np.float32(scales[i]) for i in order]


def sees(batch: MicroBatch, position: int) -> list[tuple[int, int]]:
    """(position id, token) of everything that a position attends to: the oracle of the mask."""
    bounds = batch.cu_seqlens.tolist()
    segment = max(number for number, start in enumerate(bounds[:-1]) if start <= position)
    spans = [range(bounds[segment], position + 1)]
    prefix = batch.prefix_segments[segment]
    if prefix is not None:
        spans.insert(0, range(bounds[prefix], bounds[prefix + 1]))
    return [(int(batch.position_ids[place]), int(batch.tokens[place])) for span in spans for place in span]


@given(ragged_rows(), st.booleans(), st.integers(1, 8))
def test_each_target_sees_its_whole_row_and_nothing_else(
    given_rows: list[Row], share_prefix: bool, pad_to_multiple: int
) -> None:
    rows, indices = make_rows(given_rows), list(range(len(given_rows)))
    batch = pack(rows, indices, share_prefix=share_prefix, pad_to_multiple=pad_to_multiple)
    spans, starts = spans_of(batch), starts_of(rows.num_targets)
    assert sorted(spans) == indices
    for index, (start, stop) in spans.items():
        prompt, response, _ = given_rows[index]
        assert batch.targets[start:stop].tolist() == response
        assert batch.fields["advantages"][start:stop].tolist() == [place + 1 for place in range(len(response))]
        assert batch.row_ids[start:stop].tolist() == [index] * len(response)
        assert batch.places.starts[batch.places.rows == index].tolist() == [int(starts[index])]
        for place in range(start, stop):
            assert sees(batch, place) == list(enumerate([*prompt, *response][: len(prompt) + place - start]))
    assert int(batch.target_mask.sum()) == rows.num_targets.sum()
    assert len(batch.tokens) % pad_to_multiple == 0
    packed = packed_length(rows, indices, share_prefix=share_prefix)
    assert 0 <= len(batch.tokens) - packed < pad_to_multiple
