"""Safetensors files of fixed layout, read and written at offsets, by several threads, processes or hosts.

The ranks of a run write a Hugging Face export together, each its own parts; any safetensors reader opens the file. On
NFS every host has a page cache of its own, and only pwrite tells the client which bytes of a page are new: a shared
mapping would send whole pages, with old bytes where other hosts have written.

Format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, JSON header, data
without holes. Safetensors sorts tensors by dtype; here they keep the caller's order.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import _TYPES
from torch import Tensor

from megarlhf.formats.shared_memory import bytes_of

_DTYPES = cast(dict[str, torch.dtype], _TYPES)
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT_BYTES = 64  # of the data's start: a cache line, and enough for every vector load
_MAX_HEADER_BYTES = 100_000_000  # the safetensors limit


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and type of one tensor in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def _offsets(specs: Sequence[TensorSpec]) -> list[int]:
    """Start of each tensor in bytes from the data's start; raises ValueError where a view would be misaligned."""
    starts = list(accumulate((spec.num_bytes for spec in specs), initial=0))[:-1]
    for spec, start in zip(specs, starts, strict=True):
        if start % spec.dtype.itemsize:
            raise ValueError(
                f"tensor {spec.name!r} would start at byte {start}, which its {spec.dtype.itemsize}-byte elements do "
                "not divide (the format has no holes): put tensors of wider types first"
            )
    return starts


def _encode_header(specs: Sequence[TensorSpec]) -> bytes:
    """Length prefix and JSON, padded with spaces so that the data is aligned."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for spec, start in zip(specs, _offsets(specs), strict=True):
        if spec.dtype not in _DTYPE_NAMES:
            raise ValueError(f"tensor {spec.name!r} has dtype {spec.dtype}, which safetensors cannot hold")
        offsets = [start, start + spec.num_bytes]
        header[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _places(specs: Sequence[TensorSpec]) -> dict[str, tuple[int, TensorSpec]]:
    """Each tensor's first byte in a file that is made with this layout, and its spec."""
    first = len(_encode_header(specs))
    return {spec.name: (first + start, spec) for spec, start in zip(specs, _offsets(specs), strict=True)}


def tensor_places(path: str | os.PathLike[str]) -> dict[str, tuple[int, TensorSpec]]:
    """Each tensor's first byte in a safetensors file and its spec, in file order; reads the header alone.

    Raises:
        ValueError: not a safetensors file, cut short, or with a misaligned tensor.
    """
    with open(path, "rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise ValueError(f"{path} is no safetensors file: header length {length} in a file of {file_bytes} bytes")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"]))
        specs = [TensorSpec(name, tuple(map(int, e["shape"])), _DTYPES[e["dtype"]]) for name, e in entries]
        ends = [int(entry["data_offsets"][1]) for _, entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is no safetensors file: its header does not parse ({error!r})") from error
    starts = _offsets(specs)
    if ends != [start + spec.num_bytes for start, spec in zip(starts, specs, strict=True)]:
        raise ValueError(f"{path}: tensor offsets overlap, leave holes or disagree with the shapes")
    expected = 8 + length + (ends[-1] if ends else 0)
    if expected != file_bytes:
        raise ValueError(f"{path} has {file_bytes} bytes where its header says {expected}: cut short?")
    return {spec.name: (8 + length + start, spec) for spec, start in zip(specs, starts, strict=True)}


def create_tensor_file(path: str | os.PathLike[str], specs: Sequence[TensorSpec]) -> None:
    """Make a new file of zeros with this layout, readable by its owner alone; it is on the disk.

    Its whole space is reserved here, so that no later write into it can run out of space. Nothing of it stays in this
    host's page cache: an NFS client that has the zeros of a page sends them along with what is written into it.

    Raises:
        FileExistsError: something exists at `path`.
        OSError: the file system has not enough space; nothing is left behind.
        ValueError: a dtype outside safetensors, or an order that misaligns a tensor.
    """
    header = _encode_header(specs)
    size = len(header) + sum(spec.num_bytes for spec in specs)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
        os.pwrite(descriptor, header, 0)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)


class TensorFiles(AbstractContextManager["TensorFiles"]):
    """Tensors in safetensors files, read and written at their offsets; from any thread.

    Args:
        writable: they are written too.
        specs: the layout of the one file, where it is only written, and by other hosts at the same time: nothing of it
            is read, the header neither, so that this host's page cache has no page of it but what is written here.
    Raises:
        ValueError: see tensor_places.
    """

    def __init__(
        self, paths: Sequence[Path], *, writable: bool = False, specs: Sequence[TensorSpec] | None = None
    ) -> None:
        places = (_places(specs),) if specs is not None else map(tensor_places, paths)
        # each tensor's file, first byte and spec
        self.places = {
            name: (path, *place) for path, found in zip(paths, places, strict=True) for name, place in found.items()
        }
        flags = os.O_WRONLY if specs is not None else os.O_RDWR if writable else os.O_RDONLY
        self._descriptors = {path: os.open(path, flags) for path in paths}

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype."""
        return self.places[name][2].dtype

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill a contiguous tensor of the same bytes."""
        path, start, _ = self.places[name]
        self._move(path, start, bytes_of(out), lambda descriptor, rest, at: os.preadv(descriptor, [rest], at))

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        out = torch.empty(self.places[name][2].shape, dtype=self.dtype(name))
        self.read_into(name, out)
        return out

    def write(self, name: str, tensor: Tensor, index: tuple[slice, ...] = ()) -> None:
        """Put a whole tensor, or the part at an index, in its place and in the file's dtype.

        Args:
            tensor: on any device; may have more dimensions than the part in the file.
        """
        path, start, spec = self.places[name]
        rest, size = bytes_of(tensor.detach().to("cpu", spec.dtype).contiguous()), spec.dtype.itemsize
        for first, count in _runs(spec.shape, index):
            self._move(path, start + first * size, rest[: count * size], os.pwrite)
            rest = rest[count * size :]
        assert not rest, "the part in the file is smaller than what is given"

    def _move(self, path: Path, start: int, rest: memoryview, move: Callable[[int, memoryview, int], int]) -> None:
        while rest:
            count = move(self._descriptors[path], rest, start)
            if count == 0:
                raise ValueError(f"{path} ends at byte {start}: it was cut short meanwhile")
            rest, start = rest[count:], start + count

    def sync(self, names: Sequence[str] | None = None) -> None:
        """Wait until the files with these tensors, or all, are on the disk; on NFS until the server has them."""
        for path in self._descriptors if names is None else {self.places[name][0] for name in names}:
            os.fdatasync(self._descriptors[path])

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def _runs(shape: tuple[int, ...], index: tuple[slice, ...]) -> Iterator[tuple[int, int]]:
    """What of a part lies together in the whole tensor: the number of its first element there, and how many, in order.

    Args:
        index: slices of step 1 of the first dimensions.
    """
    sizes = shape or (1,)
    parts = (*index, *[slice(None)] * (len(sizes) - len(index)))
    bounds = [part.indices(size)[:2] for part, size in zip(parts, sizes, strict=True)]
    cut = max((i for i, size in enumerate(sizes) if bounds[i] != (0, size)), default=0)
    inner, (first, end) = math.prod(sizes[cut + 1 :]), bounds[cut]
    for outer in product(*(range(*pair) for pair in bounds[:cut])):
        place = 0
        for number, size in zip((*outer, first), sizes[: cut + 1], strict=True):
            place = place * size + number
        yield place * inner, (end - first) * inner
