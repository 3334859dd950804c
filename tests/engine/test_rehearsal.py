"""Groups and places of a rehearsed world against the ones that each of its ranks gets, and faults that it tells."""

from dataclasses import replace

import pytest

from megarlhf.engine.rehearsal import check_coverage, check_partition
from megarlhf.formats.shared_memory import Piece
from megarlhf.parallel.groups import ParallelSizes, fake_world, world_groups, world_ranks

PIECE = Piece(name="a", shape=(4, 6), index=(slice(0, 4), slice(0, 3)), offset=0, size=(4, 3), stride=(3, 1))
OTHER = replace(PIECE, index=(slice(0, 4), slice(3, 6)))


@pytest.mark.parametrize(
    ("sizes", "world_size"),
    [
        (ParallelSizes(tensor=2, pipeline=2, context=2, virtual=2), 16),
        (ParallelSizes(tensor=2, expert=4, expert_tensor=1, pipeline=2), 16),
    ],
)
def test_places_are_those_of_every_rank(sizes: ParallelSizes, world_size: int) -> None:
    found = world_ranks(world_groups(sizes, world_size=world_size), sizes)
    assert len(found) == world_size
    for rank, expected in enumerate(found):
        with fake_world(sizes, rank=rank, world_size=world_size) as ranks:
            assert ranks == expected


@pytest.mark.parametrize("groups", [[(0, 1), (2,)], [(0, 1), (1, 2, 3)], [(0, 1), (2, 4)]])
def test_groups_that_are_no_partition_are_told(groups: list[tuple[int, ...]]) -> None:
    check_partition("TENSOR", [(0, 3), (2, 1)], 4)
    with pytest.raises(RuntimeError, match="TENSOR: "):
        check_partition("TENSOR", groups, 4)


def test_middle_stages_have_no_embedding() -> None:
    check_partition("EMBEDDING_GROUP", [(0, 2)], 4)
    with pytest.raises(RuntimeError, match="EMBEDDING_GROUP"):
        check_partition("EMBEDDING_GROUP", [(0, 2), (2, 3)], 4)


def test_weights_that_nobody_or_two_hand_out_are_told() -> None:
    shapes = {"a": (4, 6)}
    check_coverage(shapes, [[OTHER], [], [PIECE]])
    shifted = replace(PIECE, index=(slice(0, 4), slice(1, 4)))
    for sent in ([[PIECE]], [[PIECE], [PIECE]], [[OTHER], [shifted]], [[PIECE, OTHER], [OTHER]]):
        with pytest.raises(RuntimeError, match="a: [0-9]+ of 24 numbers are handed out"):
            check_coverage(shapes, sent)
    with pytest.raises(RuntimeError, match="handed out, and not the model's"):
        check_coverage(shapes, [[PIECE, OTHER], [replace(PIECE, name="b")]])
