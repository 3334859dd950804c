"""Buckets of weights: every number once, in few bytes at a time, and whole tensors out of them."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.formats.buckets import Assembly, Bucket, Digester, plan_buckets
from megarlhf.formats.shared_memory import Block, Piece

ROWS = slice(0, 6)


def held() -> tuple[list[list[Block]], list[list[Tensor]], dict[str, Tensor]]:
    """Two senders' blocks, their numbers, and the tensors that these make up."""
    whole = {"q": torch.randn(16, 3), "k": torch.randn(4, 3), "o": torch.randn(6, 10), "b": torch.randn(7).bfloat16()}
    fused = torch.empty(2, 10, 3)  # two groups of eight rows of q and two of k, as Megatron-Core keeps them
    fused[:, :8], fused[:, 8:] = whole["q"].view(2, 8, 3), whole["k"].view(2, 2, 3)

    def piece(name: str, index: tuple[slice, ...], view: Tensor) -> Piece:
        offset, size = int(view.storage_offset()), tuple(view.shape)
        shape = tuple(whole[name].shape)
        return Piece(name=name, shape=shape, index=index, offset=offset, size=size, stride=view.stride())

    columns = [whole["o"][:, :4].contiguous(), whole["o"][:, 4:].contiguous()]
    groups = fused.view(2, 5, 2, 3)  # heads of two rows
    qk = (
        piece("q", (slice(0, 16), slice(0, 3)), groups[:, :4]),
        piece("k", (slice(0, 4), slice(0, 3)), groups[:, 4]),
    )
    numbers = [[columns[0], fused.view(20, 3)], [whole["b"], columns[1]]]
    pieces: Any = [
        [((piece("o", (ROWS, slice(0, 4)), columns[0]),), 2), (qk, 0)],
        [((piece("b", (slice(0, 7),), whole["b"]),), 3), ((piece("o", (ROWS, slice(4, 10)), columns[1]),), 2)],
    ]
    blocks = [
        [
            Block(length=t.numel(), dtype=t.dtype, pieces=parts, position=position)
            for t, (parts, position) in zip(tensors, described, strict=True)
        ]
        for tensors, described in zip(numbers, pieces, strict=True)
    ]
    return blocks, numbers, whole


def filled(bucket: Bucket, numbers: list[list[Tensor]]) -> Tensor:
    memory = torch.full((bucket.num_bytes,), 255, dtype=torch.uint8)
    bucket.fill(memory, lambda number: numbers[bucket.sender][number])
    return memory


@pytest.mark.parametrize("most_bytes", [24, 32, 48, 96, 104, 200, 4096])
def test_whole_tensors_come_out_in_order(most_bytes: int) -> None:
    blocks, numbers, whole = held()
    buckets = plan_buckets(blocks, most_bytes=most_bytes)
    assert all(bucket.num_bytes <= most_bytes and bucket.num_bytes % 8 == 0 for bucket in buckets)
    assembly, found = Assembly(), list[tuple[str, Tensor]]()
    for bucket in buckets:
        found += assembly.take(bucket, filled(bucket, numbers))
    assert [name for name, _ in found] == ["q", "k", "o", "b"]
    for name, tensor in found:
        assert tensor.dtype == whole[name].dtype and torch.equal(tensor, whole[name]), name
    assert sum(part.num_bytes for bucket in buckets for part in bucket.parts) == (48 + 12 + 60) * 4 + 7 * 2


def test_a_bucket_is_filled_before_the_next_and_has_one_sender() -> None:
    blocks, _, _ = held()
    buckets = plan_buckets(blocks, most_bytes=4096)
    assert [(b.sender, [p.piece.name for p in b.parts]) for b in buckets] == [(0, ["q", "k", "o"]), (1, ["o", "b"])]
    assert buckets[1].num_bytes == 6 * 6 * 4 + 16  # 14 bytes in two words
    small = plan_buckets(blocks, most_bytes=104)
    sizes = [[(p.piece.name, p.num_bytes) for p in b.parts] for b in small]
    assert sizes[:3] == [[("q", 96)], [("q", 96)], [("k", 48), ("o", 48)]]  # half of o's part has room


def test_what_cannot_be_cut_small_enough_is_told() -> None:
    blocks, _, _ = held()
    with pytest.raises(ValueError, match="a row of 'o' has 6 numbers, and a bucket 4"):
        plan_buckets(blocks, most_bytes=16)
    blocks[1].pop()
    with pytest.raises(ValueError, match="'o' do not make up a tensor"):
        plan_buckets(blocks, most_bytes=4096)


def test_bytes_between_numbers_are_zero() -> None:
    blocks, numbers, _ = held()
    one, other = blocks[1][0], replace(blocks[1][0], position=4)
    other = replace(other, pieces=(replace(one.pieces[0], name="c"),))
    (bucket,) = plan_buckets([[one, other]], most_bytes=4096)
    assert [part.start for part in bucket.parts] == [0, 16]
    memory = filled(bucket, [[numbers[1][0], numbers[1][0]]])
    assert not memory[14:16].any() and not memory[30:].any() and torch.equal(memory[:16], memory[16:])


def obvious_digest(memory: Tensor) -> int:
    """The formula in Python's integers."""
    whole, chunk, odd = 2**64, 1 << 17, -7046029254386353131

    def mixed(number: int) -> int:
        number %= whole
        return number ^ (number >> 32)

    def constant(place: int) -> int:
        number = place * odd % whole
        signed = number - whole if number >= whole // 2 else number
        return ((signed ^ (signed >> 29)) * odd | 1) % whole

    words = [int.from_bytes(bytes(memory[i : i + 8].tolist()), "little") for i in range(0, len(memory), 8)]
    total = 0
    for start in range(0, len(words), chunk):
        terms = [mixed(mixed(word * odd) * constant(i + 1)) for i, word in enumerate(words[start : start + chunk])]
        total = (total * odd + sum(terms)) % whole
    return total - whole if total >= whole // 2 else total


def test_a_digest_is_its_formula_and_tells_every_word() -> None:
    digest = Digester(torch.device("cpu"))
    memory = torch.randint(0, 256, (800,), dtype=torch.uint8)
    before = int(digest(memory))
    assert before == obvious_digest(memory)
    seen = {before}
    for place in (0, 7, 401, 799):
        for bit in (1, 128):
            memory[place] ^= bit
            seen.add(int(digest(memory)))
            memory[place] ^= bit
    assert len(seen) == 9 and int(digest(memory)) == before
    for pair in itertools.combinations(range(12), 2):  # signs, which could cancel out
        signs = memory.view(torch.int32).clone()
        signs[list(pair)] ^= -(2**31)
        seen.add(int(digest(signs.view(torch.uint8))))
    seen.add(int(digest((memory.view(torch.int32) ^ -(2**31)).view(torch.uint8))))
    assert len(seen) == 9 + 66 + 1
    assert int(digest(memory.view(100, 8).flip(0).reshape(-1))) != before


def test_a_digest_of_more_than_a_chunk() -> None:
    memory = torch.zeros((1 << 20) + 16, dtype=torch.uint8)
    memory[5], memory[1 << 20] = 3, 9
    digest = Digester(torch.device("cpu"))
    assert int(digest(memory)) == obvious_digest(memory)
    swapped = torch.cat([memory[1 << 20 :], memory[: 1 << 20]])
    assert int(digest(swapped)) != int(digest(memory))
