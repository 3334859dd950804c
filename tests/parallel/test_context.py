"""Which part of a line each context rank has, and the ring's arithmetic without a ring."""

import numpy as np
import pytest
import torch

from megarlhf.data.packing import fill_fields, gather_targets, pack_rows
from megarlhf.data.types import TrainingRows, training_rows
from megarlhf.parallel.context import context_indices, context_part, join_context
from megarlhf.parallel.cpu.segments import context_blocks


def test_each_rank_has_an_early_and_a_late_chunk_of_every_segment() -> None:
    boundaries = torch.tensor([0, 4, 12], dtype=torch.int32)
    assert context_indices(boundaries, 0, 2).tolist() == [0, 3, 4, 5, 10, 11]
    assert context_indices(boundaries, 1, 2).tolist() == [1, 2, 6, 7, 8, 9]


def make_rows(*lengths: int) -> TrainingRows:
    """Rows with prompts of two tokens."""
    ids = [
        torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        for seed, length in enumerate(lengths)
    ]
    advantages = [torch.arange(length - 2.0) + 100 * seed for seed, length in enumerate(lengths)]
    return training_rows(ids, [2] * len(ids), fields={"advantages": advantages})


@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_join_to_the_line_and_rows_come_back(size: int) -> None:
    rows = make_rows(5, 12, 9, 3)
    whole = pack_rows(rows, [0, 1, 2, 3], share_prefix=False, context_size=size, pad_to_multiple=2)
    whole = fill_fields(whole, rows)
    lengths = (whole.cu_seqlens[1:] - whole.cu_seqlens[:-1]).tolist()
    assert all(length % (2 * size) == 0 for length in lengths)
    assert len(whole.tokens) % (2 * size) == 0, "sequence parallelism divides each rank's part"
    parts = [context_part(whole, rank, size) for rank in range(size)]
    assert {len(part.tokens) for part in parts} == {len(whole.tokens) // size}
    for name in ("tokens", "targets", "position_ids", "target_mask", "row_ids"):
        joined = join_context([getattr(part, name) for part in parts], whole.cu_seqlens)
        assert torch.equal(joined, getattr(whole, name)), name
    advantages = join_context([part.fields["advantages"] for part in parts], whole.cu_seqlens)
    found = gather_targets(whole, advantages)
    assert sorted(found.indices) == list(range(sum((3, 10, 7, 1))))
    assert found.values.tolist() == rows.fields["advantages"][found.indices].tolist()
    own = np.concatenate([ids[2:] for ids in np.split(rows.input_ids, np.cumsum(rows.lengths)[:-1])])
    assert gather_targets(whole, whole.targets).values.tolist() == own[found.indices].tolist()


@pytest.mark.parametrize("size", [2, 3])
def test_masks_let_each_query_see_its_own_segment_up_to_itself(size: int) -> None:
    rows = make_rows(7, 300, 13)
    whole = pack_rows(rows, [0, 1, 2], share_prefix=False, context_size=size)
    segment = torch.repeat_interleave(torch.arange(len(whole.cu_seqlens) - 1), whole.cu_seqlens.diff().long())
    for rank in range(size):
        covered = 0
        for block in context_blocks(whole.cu_seqlens, rank, size):
            own = context_indices(whole.cu_seqlens, rank, size)[block.start : block.stop]
            keys = torch.cat(
                [context_indices(whole.cu_seqlens, r, size)[block.start : block.stop] for r in range(size)]
            )
            expected = (segment[own][:, None] == segment[keys]) & (own[:, None] >= keys)
            assert block.mask is not None and torch.equal(block.mask, expected)
            covered += block.stop - block.start
        assert covered == len(whole.tokens) // size
