"""Tensors of one process that other processes on the host read where they lie.

The trainer's ranks hold blocks of shared memory, in whatever arrangement they compute with, and say which numbers of a
block are which part of which named tensor. A reader maps the same memory and looks at whole tensors, or puts them
together. Who reads when is the caller's affair; digests of the bytes tell whether both saw the same.
"""

import math
import mmap
import os
import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import xxhash
from torch import Tensor

SHARED_MEMORY = "/dev/shm"  # the file system whose size limits what a host can share

_ALIGNMENT_BYTES = 64  # of each block that is moved: a cache line, and enough for every vector load


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a named tensor, and where its numbers are in a block."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    index: tuple[slice, ...]  # of the part in the whole tensor: a start and a stop for each dimension
    offset: int  # of the part's first number in the block
    size: tuple[int, ...]  # of the part as it lies in the block, which may take more dimensions than the tensor has
    stride: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Contiguous numbers in the memory of one process."""

    length: int  # numbers
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    position: int = 0  # of the block's tensors among all: readers take tensors in this order, in equal places as listed

    @property
    def num_bytes(self) -> int:
        """Bytes of the block."""
        return self.length * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class SharedBlock(Block):
    """One that other processes of the host can read where it lies."""

    path: str  # of the memory: /proc/<process>/fd/<descriptor>, there for as long as the process is
    start: int  # bytes


def copy_part(source: Tensor, whole: Tensor, index: tuple[slice, ...]) -> None:
    """Copy the numbers of a part, which `source` may hold in more dimensions, into their place in the whole tensor."""
    part = whole[index]
    (part.view(source.shape) if part.is_contiguous() else part).copy_(source)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def digest(memory: memoryview) -> bytes:
    """XXH3-64, 8 bytes."""
    return xxhash.xxh3_64_digest(memory)


def checksum(digests: Iterable[bytes]) -> str:
    """32 hex digits over blocks: XXH3-128 of their digests in order.

    It tells a complete version from a partial or mixed one; it does not withstand an attacker.
    """
    return xxhash.xxh3_128_hexdigest(b"".join(digests))


def check_shared_memory(num_bytes: int, free_bytes: int, *, object_store_bytes: int = 0) -> None:
    """Raises ValueError where weights, and an object store that Ray is still to make, do not fit into what was free."""
    if num_bytes + object_store_bytes > 0.99 * free_bytes:
        store = f" and Ray's object store of {object_store_bytes / 2**30:.2f} GiB" if object_store_bytes else ""
        raise ValueError(
            f"weights of {num_bytes / 2**30:.2f} GiB{store} do not fit into {SHARED_MEMORY}, where "
            f"{free_bytes / 2**30:.2f} GiB are free (engines and ranks read them there): make it larger (in a "
            "container, --shm-size)"
        )


def free_shared_memory() -> int:
    """Bytes that processes of this host can still share."""
    return shutil.disk_usage(SHARED_MEMORY).free


def bytes_to_move(tensors: Sequence[Tensor], pools: Sequence[Tensor]) -> int:
    """Shared memory that `move_to_shared_memory` would take, in bytes."""
    pooled = {pool.untyped_storage().data_ptr() for pool in pools}
    moved = sum(pool.untyped_storage().nbytes() for pool in pools if not pool.is_shared())
    alone = [t for t in tensors if t.untyped_storage().data_ptr() not in pooled and not t.is_shared()]
    return moved + _region_bytes(alone)


def move_to_shared_memory(tensors: Sequence[Tensor], pools: Sequence[Tensor]) -> None:
    """Bring CPU tensors' numbers into shared memory; the tensors are used as before, and others can read them.

    Addresses change: what holds one (a NumPy array, an operation under way) must not be used afterwards.

    Args:
        pools: larger tensors that some of `tensors` are views of. Their storages are moved whole, and every view moves
            along. Every other tensor must have its memory to itself: its `data` is set to a place in a new region.
    """
    for pool in pools:
        pool.untyped_storage().share_memory_()
    outside = [tensor for tensor in tensors if not tensor.is_shared()]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in outside), "views of a missing pool"
    for tensor, place in zip(outside, copies_together(outside, shared=True), strict=True):
        tensor.data = place


def copies_together(tensors: Sequence[Tensor], *, shared: bool = False) -> list[Tensor]:
    """Copies one after the other in one new storage, each aligned: on the tensors' device, or in shared memory."""
    device = None if shared or not tensors else tensors[0].device
    region = torch.empty(_region_bytes(tensors), dtype=torch.uint8, device=device)
    if shared and tensors:
        region.untyped_storage().share_memory_()
    return copies_in(region, tensors)


def copies_in(region: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies one after the other in a region of bytes, each aligned."""
    copies, start = [], 0
    for tensor in tensors:
        place = region[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(place.copy_(tensor.detach()))
        start += _region_bytes([tensor])
    return copies


def describe_block(tensor: Tensor, pieces: Sequence[Piece], *, position: int = 0) -> SharedBlock:
    """A contiguous tensor that lies in shared memory, as other processes find it."""
    assert tensor.is_contiguous() and tensor.is_shared()
    descriptor, _ = tensor.untyped_storage()._share_fd_cpu_()  # the storage's own; it stays open as long as that lives
    return SharedBlock(
        path=f"/proc/{os.getpid()}/fd/{descriptor}",
        start=int(tensor.storage_offset()) * tensor.dtype.itemsize,
        length=tensor.numel(),
        dtype=tensor.dtype,
        pieces=tuple(pieces),
        position=position,
    )


def pieces_by_name(blocks: Sequence[Block]) -> dict[str, list[tuple[int, Piece]]]:
    """The parts of each tensor with the number of their block; tensors in the order of the blocks' positions.

    Raises:
        ValueError: pieces that do not make up whole tensors.
    """
    found: dict[str, list[tuple[int, Piece]]] = {}
    for number, block in sorted(enumerate(blocks), key=lambda entry: entry[1].position):
        for piece in block.pieces:
            found.setdefault(piece.name, []).append((number, piece))
    for name, parts in found.items():
        shape = parts[0][1].shape
        alike = len({(piece.shape, blocks[number].dtype) for number, piece in parts}) == 1
        if not (alike and _cover([piece for _, piece in parts], shape)):
            raise ValueError(f"the parts of {name!r} do not make up a tensor of shape {shape}")
    return found


class SharedTensors:
    """Named tensors over blocks of other processes.

    The memory is mapped for reading: writing into a view ends the process with SIGSEGV.

    Raises:
        ValueError: pieces that do not make up whole tensors.
    """

    def __init__(self, blocks: Sequence[SharedBlock]) -> None:
        self.blocks = list(blocks)
        regions = {path: map_region(path) for path in dict.fromkeys(block.path for block in blocks)}
        self._memory = [regions[b.path][b.start : b.start + b.num_bytes].view(b.dtype) for b in blocks]
        self._bytes = [bytes_of(memory) for memory in self._memory]
        self._pieces = pieces_by_name(blocks)

    @property
    def names(self) -> list[str]:
        """Tensor names, in the order of their blocks' positions."""
        return list(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor; KeyError for an unknown name."""
        return self._pieces[name][0][1].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's numbers."""
        return self.blocks[self._pieces[name][0][0]].dtype

    def blocks_of(self, names: Iterable[str]) -> list[int]:
        """Numbers of the blocks in which these tensors lie."""
        return list(dict.fromkeys(number for name in names for number, _ in self._pieces[name]))

    def digest(self, number: int) -> bytes:
        """`digest` of a block as it is now."""
        return digest(self._bytes[number])

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """A copy of a whole tensor, in `out` if given, which may be of another dtype."""
        if out is None:
            out = torch.empty(self.shape(name), dtype=self.dtype(name))
        for number, piece in self._pieces[name]:
            copy_part(self._view(number, piece), out, piece.index)
        return out

    def joined(self, names: Sequence[str]) -> Tensor | None:
        """One view over tensors that follow each other in one block, joined along dimension 0.

        None where they do not, or are cut, or differ in the other dimensions.
        """
        held = [entry for name in names for entry in self._pieces[name]]
        number, first = held[0]
        end = first.offset
        for block, piece in held:
            in_order = (block, piece.offset) == (number, end) and self._view(block, piece).is_contiguous()
            if not in_order or len(held) != len(names) or piece.shape[1:] != first.shape[1:]:
                return None
            end += math.prod(piece.shape)
        return self._memory[number][first.offset : end].view(-1, *first.shape[1:])

    def _view(self, number: int, piece: Piece) -> Tensor:
        memory = self._memory[number]
        return memory.as_strided(piece.size, piece.stride, memory.storage_offset() + piece.offset)


def _cover(pieces: Sequence[Piece], shape: tuple[int, ...]) -> bool:
    """Whether pieces are a tensor, each number once."""
    lengths = [math.prod(part.stop - part.start for part in piece.index) for piece in pieces]
    same_sizes = lengths == [math.prod(piece.size) for piece in pieces]
    inside = all(0 <= part.start <= part.stop <= n for p in pieces for part, n in zip(p.index, shape, strict=True))
    apart = all(
        any(a.stop <= b.start or b.stop <= a.start for a, b in zip(one.index, other.index, strict=True))
        for one, other in combinations(pieces, 2)
    )
    return inside and apart and same_sizes and sum(lengths) == math.prod(shape)


def _region_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of a region for these, each aligned."""
    return sum(-(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for tensor in tensors)


def map_region(path: str) -> Tensor:
    """The bytes of a region of shared memory; writing there ends the process with SIGSEGV."""
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with warnings.catch_warnings():  # the mapping is read-only and so is the tensor, as documented
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8)
