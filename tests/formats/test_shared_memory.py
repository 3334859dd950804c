"""Tensors in shared memory: moved in place, described, and read by another process in whatever arrangement they lie."""

import multiprocessing
from dataclasses import replace
from multiprocessing.connection import Connection

import pytest
import torch
import xxhash
from torch import Tensor

from megarlhf.formats.shared_memory import (
    Piece,
    SharedBlock,
    SharedTensors,
    bytes_of,
    bytes_to_move,
    checksum,
    copies_together,
    copy_part,
    describe_block,
    digest,
    move_to_shared_memory,
)


def piece(name: str, shape: tuple[int, ...], rows: slice, view: Tensor) -> Piece:
    """Rows of a tensor that lie in `view`, which is a view of its block's first number on."""
    index = (rows, *(slice(0, length) for length in shape[1:]))
    offset, size, stride = int(view.storage_offset()), tuple(view.shape), view.stride()
    return Piece(name=name, shape=shape, index=index, offset=offset, size=size, stride=stride)


def whole_piece(name: str, tensor: Tensor) -> Piece:
    """A tensor that is a block to itself."""
    shape = tuple(tensor.shape)
    index = tuple(slice(0, length) for length in shape)
    return Piece(name=name, shape=shape, index=index, offset=0, size=shape, stride=tensor.stride())


def interleaved() -> tuple[Tensor, list[Piece]]:
    """q, k and v of two groups as Megatron-Core keeps them: [2 groups, 4 queries + k + v, 4]."""
    block = torch.arange(48.0).view(12, 4)
    groups = block.view(2, 6, 4)
    pieces = [
        piece("q", (8, 4), slice(0, 8), groups[:, :4]),
        piece("k", (2, 4), slice(0, 2), groups[:, 4]),
        piece("v", (2, 4), slice(0, 2), groups[:, 5]),
    ]
    return block, pieces


def shared(tensor: Tensor, pieces: list[Piece]) -> SharedBlock:
    (copy,) = copies_together([tensor], shared=True)
    KEPT.append(copy)
    return describe_block(copy, pieces)


KEPT: list[Tensor] = []  # the memory of the blocks above


def test_interleaved_parts_are_put_together() -> None:
    block, pieces = interleaved()
    tensors = SharedTensors([shared(block, pieces)])
    assert tensors.names == ["q", "k", "v"] and tensors.blocks_of(["v", "q"]) == [0]
    expected = block.view(2, 6, 4)
    assert torch.equal(tensors.read("q"), expected[:, :4].reshape(8, 4))
    assert torch.equal(tensors.read("k"), expected[:, 4])
    assert torch.equal(tensors.read("v", torch.empty(2, 4, dtype=torch.bfloat16)), expected[:, 5].bfloat16())
    assert tensors.joined(["k"]) is None and tensors.joined(["q", "k"]) is None


def test_tensors_are_named_by_position_and_digested_as_listed() -> None:
    values = [torch.full((2,), float(i)) for i in range(4)]
    blocks = [
        replace(shared(v, [whole_piece(n, v)]), position=p)
        for v, n, p in zip(values, "dbac", (7, 1, 0, 1), strict=True)
    ]
    tensors = SharedTensors(blocks)
    assert tensors.names == ["a", "b", "c", "d"]  # in equal places as listed
    assert [tensors.digest(number) for number in range(4)] == [digest(bytes_of(value)) for value in values]


def test_parts_in_several_blocks_and_columns() -> None:
    whole = torch.randn(6, 4)
    columns = [whole[:, :2].contiguous(), whole[:, 2:].contiguous()]
    parts = [
        Piece(
            name="o", shape=(6, 4), index=(slice(0, 6), slice(2 * i, 2 * i + 2)), offset=0, size=(6, 2), stride=(2, 1)
        )
        for i in range(2)
    ]
    tensors = SharedTensors([shared(c, [p]) for c, p in zip(columns, parts, strict=True)])
    assert torch.equal(tensors.read("o"), whole) and tensors.joined(["o"]) is None
    assert tensors.blocks_of(["o"]) == [0, 1] and tensors.dtype("o") == torch.float32


def test_joined_is_a_view_of_neighbours_in_one_block() -> None:
    block = torch.randn(7, 3)
    pieces = [piece("gate", (4, 3), slice(0, 4), block[:4]), piece("up", (3, 3), slice(0, 3), block[4:])]
    other = torch.randn(3, 3)
    first = shared(block, pieces)
    tensors = SharedTensors([first, shared(other, [whole_piece("apart", other)])])
    joined = tensors.joined(["gate", "up"])
    assert joined is not None and torch.equal(joined, block)
    up = tensors.joined(["up"])
    assert up is not None and up.data_ptr() == joined.data_ptr() + 4 * 3 * 4  # no copy
    assert tensors.joined(["up", "gate"]) is None  # other order
    assert tensors.joined(["gate", "apart"]) is None  # in another block
    KEPT[-2][0] = 5  # what the owner writes is there to be read
    assert torch.equal(joined[0], torch.full((3,), 5.0))


def test_parts_that_make_no_whole_are_refused() -> None:
    block, pieces = interleaved()
    described = shared(block, pieces)
    with pytest.raises(ValueError, match=r"'q' do not make up a tensor of shape \(9, 4\)"):
        SharedTensors([replace(described, pieces=(replace(pieces[0], shape=(9, 4)),))])
    rows = [piece("w", (4, 4), slice(i, i + 2), block[:2]) for i in (0, 2, 1)]
    assert SharedTensors([replace(described, pieces=tuple(rows[:2]))]).names == ["w"]
    with pytest.raises(ValueError, match="'w' do not make up"):
        SharedTensors([replace(described, pieces=(rows[0], rows[2]))])  # one row twice, one not at all
    with pytest.raises(ValueError, match="'w' do not make up"):
        first = replace(described, pieces=(rows[0],))
        SharedTensors([first, replace(first, dtype=torch.int32, pieces=(rows[1],))])
    with pytest.raises(ValueError, match="'k' do not make up"):
        SharedTensors([described, replace(described, pieces=(pieces[1],))])


def test_moving_keeps_values_and_views() -> None:
    pool = torch.randn(100)
    view, alone = pool[10:30].view(4, 5), torch.nn.Parameter(torch.randn(3, 2))
    expected, optimizer_view = pool.clone(), pool[:50]
    tensors = [view, alone]
    before = alone.detach().clone()
    assert bytes_to_move(tensors, [pool]) == 400 + 64  # a pool whole, others aligned to 64
    move_to_shared_memory(tensors, [pool])
    assert bytes_to_move(tensors, [pool]) == 0
    assert torch.equal(pool, expected) and torch.equal(alone, before)
    blocks = [describe_block(t.detach(), [whole_piece(n, t)]) for n, t in zip("ab", tensors, strict=True)]
    read = SharedTensors(blocks)
    optimizer_view.add_(1)
    with torch.no_grad():
        alone.mul_(2)
    assert torch.equal(read.read("a"), (expected + 1)[10:30].view(4, 5)) and torch.equal(read.read("b"), before * 2)
    place = alone.data_ptr()
    move_to_shared_memory(tensors, [pool])
    assert alone.data_ptr() == place  # already there


def test_views_of_a_pool_left_out_are_refused() -> None:
    pool = torch.randn(10)
    with pytest.raises(AssertionError, match="missing pool"):
        move_to_shared_memory([pool[:4]], [])


def test_checksum_is_the_documented_hash_and_sees_one_bit() -> None:
    values = [torch.randn(5, 3), torch.randn(7).bfloat16(), torch.tensor([True, False])]
    copies = copies_together(values, shared=True)
    tensors = SharedTensors([describe_block(c, [whole_piece(str(i), c)]) for i, c in enumerate(copies)])

    def found() -> str:
        return checksum(tensors.digest(number) for number in range(3))

    parts = [xxhash.xxh3_64_digest(value.view(torch.uint8).numpy().tobytes()) for value in values]
    assert found() == checksum(digest(bytes_of(copy)) for copy in copies) == xxhash.xxh3_128_hexdigest(b"".join(parts))
    copies[2][1] = True
    assert found() != xxhash.xxh3_128_hexdigest(b"".join(parts))


def test_copy_part_takes_more_dimensions_and_columns() -> None:
    whole = torch.zeros(6, 4)
    copy_part(torch.arange(16.0).view(2, 2, 4), whole, (slice(2, 6), slice(0, 4)))
    assert torch.equal(whole[2:], torch.arange(16.0).view(4, 4)) and not whole[:2].any()
    copy_part(torch.full((6, 1), 7.0), whole, (slice(0, 6), slice(1, 2)))
    assert bool((whole[:, 1] == 7).all())


def owner(pipe: Connection) -> None:
    """Hold a tensor until told to end."""
    (held,) = copies_together([torch.arange(6.0)], shared=True)
    pipe.send(describe_block(held, [whole_piece("x", held)]))
    pipe.recv()
    held.fill_(9)
    pipe.send(None)
    pipe.recv()


def test_another_process_reads_and_keeps_what_it_mapped() -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=owner, args=(there,))
    process.start()
    block = here.recv()
    tensors = SharedTensors([block])
    assert tensors.read("x").tolist() == [0, 1, 2, 3, 4, 5]
    here.send(None)
    here.recv()
    assert tensors.read("x").tolist() == [9] * 6
    here.send(None)
    process.join(30)
    assert process.exitcode == 0
    assert tensors.read("x").tolist() == [9] * 6  # mapped memory outlives its owner
    with pytest.raises(FileNotFoundError):
        SharedTensors([block])  # and nothing of it has a name
