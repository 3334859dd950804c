"""Weights that several processes hold, cut into buckets: how they travel to readers that see none of their memory.

Every process makes the same plan, or is given it, so that a bucket is its bytes alone. A reader puts whole tensors
together as buckets come, in the order of the blocks' positions. Digests are computed on the device that holds the
bytes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megarlhf.formats.shared_memory import Block, Piece, copy_part, pieces_by_name

_WORD_BYTES = 8  # parts begin at whole words, of which the digest is
_CHUNK_WORDS = 1 << 17  # digested at once: what a digest needs beside the bucket
_ODD = -7046029254386353131  # 2^64 / golden ratio, in int64
_LOW_BITS = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Part:
    """Numbers in a bucket, contiguous there, and where they come from and belong."""

    block: int  # among its sender's
    piece: Piece  # where they are in the block and in the whole tensor
    dtype: torch.dtype
    start: int  # bytes, in the bucket

    @property
    def num_bytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.piece.size) * self.dtype.itemsize

    def of(self, bucket: Tensor) -> Tensor:
        """A view of the numbers in the bucket's bytes, in their size."""
        return bucket[self.start : self.start + self.num_bytes].view(self.dtype).view(self.piece.size)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """What one sender sends at once."""

    sender: int  # among those who hold blocks
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        """Whole words."""
        return _words(self.parts[-1].start + self.parts[-1].num_bytes)

    def fill(self, bucket: Tensor, block: Callable[[int], Tensor]) -> None:
        """Copy the sender's numbers into [num_bytes] uint8.

        Args:
            block: number -> its memory, contiguous.
        """
        end = 0
        for part in self.parts:
            bucket[end : part.start].zero_()  # what lay there before is not to be digested
            source, piece = block(part.block), part.piece
            start = int(source.storage_offset()) + piece.offset
            part.of(bucket).copy_(source.as_strided(piece.size, piece.stride, start))
            end = part.start + part.num_bytes
        bucket[end:].zero_()


def senders_of(held: Sequence[Sequence[Block]], *, by_handle: bool) -> list[int]:
    """Of all ranks those that take part: who has blocks, or each whose device's readers see its memory."""
    return [rank for rank, blocks in enumerate(held) if blocks or by_handle]


def plan_buckets(held: Sequence[Sequence[Block]], *, most_bytes: int) -> list[Bucket]:
    """Buckets of at most this many bytes, each number once.

    A bucket has numbers of one sender. Tensors that are larger than what is left of a bucket go on in the next.

    Args:
        held: the blocks of each sender.
        most_bytes: a multiple of 8.
    Raises:
        ValueError: parts that do not make up whole tensors, or a row of a tensor that is more than a bucket.
    """
    places = [(sender, number) for sender, blocks in enumerate(held) for number in range(len(blocks))]
    blocks = [held[sender][number] for sender, number in places]
    pieces_by_name(blocks)  # makes sure that they are whole tensors
    order = sorted(range(len(blocks)), key=lambda place: blocks[place].position)
    buckets: list[Bucket] = []
    parts: list[Part] = []
    last, end = -1, 0

    def close() -> None:
        nonlocal parts, end
        if parts:
            buckets.append(Bucket(sender=last, parts=tuple(parts)))
        parts, end = [], 0

    for at, whole in [(place, piece) for place in order for piece in blocks[place].pieces]:
        (sender, number), dtype = places[at], blocks[at].dtype
        for piece in _with_small_rows(whole, most_bytes // dtype.itemsize):
            unit, done = math.prod(piece.size[1:]) * dtype.itemsize, 0
            while done < piece.size[0]:
                if sender != last or end + unit > most_bytes:
                    close()
                    last = sender
                count = min(piece.size[0] - done, (most_bytes - end) // unit)
                parts.append(Part(block=number, piece=_rows(piece, done, count), dtype=dtype, start=end))
                end, done = _words(end + count * unit), done + count
    close()
    return buckets


def _with_small_rows(piece: Piece, most: int) -> Iterator[Piece]:
    """Parts of a piece in each of which one of the first dimension has at most so many numbers.

    Raises:
        ValueError: a row of the tensor has more.
    """
    if math.prod(piece.size[1:]) <= most:
        yield piece
    elif len(piece.size) <= len(piece.shape):
        raise ValueError(f"a row of {piece.name!r} has {math.prod(piece.size[1:])} numbers, and a bucket {most}")
    else:
        for first in range(piece.size[0]):
            one = _rows(piece, first, 1)
            yield from _with_small_rows(replace(one, size=one.size[1:], stride=one.stride[1:]), most)


def _rows(piece: Piece, first: int, count: int) -> Piece:
    """A part of a piece: `count` of its first dimension from `first` on."""
    if count == piece.size[0]:
        return piece
    rows, *others = piece.index
    each = (rows.stop - rows.start) // piece.size[0]  # rows of the tensor in one of the first dimension
    return replace(
        piece,
        index=(slice(rows.start + first * each, rows.start + (first + count) * each), *others),
        offset=piece.offset + first * piece.stride[0],
        size=(count, *piece.size[1:]),
    )


class Assembly:
    """Whole tensors out of buckets; it holds those that have begun and are not whole."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[Tensor, int]] = {}  # with the numbers that are still to come

    def take(self, bucket: Bucket, memory: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Copy what has come to its place, on the device where it is; names and tensors that are whole now."""
        for part in bucket.parts:
            piece = part.piece
            whole, missing = self._begun.pop(piece.name, (None, math.prod(piece.shape)))
            if whole is None:
                whole = torch.empty(piece.shape, dtype=part.dtype, device=memory.device)
            copy_part(part.of(memory), whole, piece.index)
            missing -= math.prod(piece.size)
            if missing:
                self._begun[piece.name] = whole, missing
            else:
                yield piece.name, whole


class Digester:
    """Digests of bytes where they are, on any device: 64 bits, alike on all.

    The sum over the 64-bit words w_i of m(m(w_i * a) * c_i) with odd numbers a and c_i and m(x) = x ^ (x >> 32), modulo
    2^64. One word that changed changes it for sure, and several but for a chance of about 2^-64, unless someone means
    to.
    """

    def __init__(self, device: torch.device) -> None:
        numbers = torch.arange(1, _CHUNK_WORDS + 1, device=device) * _ODD
        numbers ^= numbers >> 29
        self._constants = (numbers * _ODD) | 1

    def __call__(self, memory: Tensor) -> Tensor:
        """[] int64 of [n] uint8, n a multiple of 8."""
        total = torch.zeros((), dtype=torch.int64, device=memory.device)
        for words in memory.view(torch.int64).split(_CHUNK_WORDS):
            mixed = words * _ODD
            mixed ^= (mixed >> 32) & _LOW_BITS  # the sign is no number
            mixed *= self._constants[: len(words)]
            mixed ^= (mixed >> 32) & _LOW_BITS
            total = total * _ODD + mixed.sum()
        return total


def digest_bytes(digests: Sequence[int]) -> list[bytes]:
    """As formats/shared_memory.checksum takes them."""
    return [digest.to_bytes(8, "little", signed=True) for digest in digests]


def _words(num_bytes: int) -> int:
    return -(-num_bytes // _WORD_BYTES) * _WORD_BYTES
