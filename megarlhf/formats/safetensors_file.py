"""A safetensors file of fixed layout that several processes map and write in place.

The ranks of a run write a Hugging Face export together, each its own parts; any safetensors reader opens the file.

Format: 8 bytes little-endian header length, JSON header, data without holes
(https://github.com/huggingface/safetensors#format). Safetensors sorts tensors by dtype; here they keep the caller's
order.
"""

import json
import math
import mmap
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

_DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}

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
    starts, offset, seen = [], 0, set[str]()
    for spec in specs:
        if spec.name in seen:
            raise ValueError(f"tensor name {spec.name!r} occurs twice: names in a tensor file are unique")
        seen.add(spec.name)
        if offset % spec.dtype.itemsize:
            raise ValueError(
                f"tensor {spec.name!r} would start at byte {offset}, which its {spec.dtype.itemsize}-byte elements do "
                "not divide (the format has no holes): put tensors of wider types first"
            )
        starts.append(offset)
        offset += spec.num_bytes
    return starts


def _encode_header(specs: Sequence[TensorSpec], metadata: dict[str, str]) -> bytes:
    """Length prefix and JSON, padded with spaces so that the data is aligned."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for spec, start in zip(specs, _offsets(specs), strict=True):
        if spec.dtype not in _DTYPE_NAMES:
            raise ValueError(f"tensor {spec.name!r} has dtype {spec.dtype}, which safetensors cannot hold")
        offsets = [start, start + spec.num_bytes]
        header[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _decode_header(
    path: Path, file_bytes: int, mapped: mmap.mmap | bytes
) -> tuple[list[TensorSpec], dict[str, str], int]:
    """Specs in file order, metadata and the data's first byte; raises ValueError for anything malformed."""
    length = int.from_bytes(mapped[:8], "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, file_bytes - 8):
        raise ValueError(f"{path} is not a safetensors file: header length {length} in a file of {file_bytes} bytes")
    try:
        header = json.loads(mapped[8 : 8 + length])
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        entries = sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"]))
        specs = [TensorSpec(name, tuple(map(int, e["shape"])), _DTYPES[e["dtype"]]) for name, e in entries]
        ends = [int(entry["data_offsets"][1]) for _, entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is not a safetensors file: its header does not parse ({error!r})") from error
    starts = _offsets(specs)
    if ends != [start + spec.num_bytes for start, spec in zip(starts, specs, strict=True)]:
        raise ValueError(f"{path}: tensor offsets overlap, leave holes or disagree with the shapes")
    data_bytes = ends[-1] if ends else 0
    if 8 + length + data_bytes != file_bytes:
        raise ValueError(f"{path} has {file_bytes} bytes where its header says {8 + length + data_bytes}: cut short?")
    return specs, metadata, 8 + length


def tensor_places(path: str | os.PathLike[str]) -> dict[str, tuple[int, TensorSpec]]:
    """Each tensor's first byte in a safetensors file and its spec, in file order; reads the header alone.

    For programs that read and write at offsets: pages of a mapping count as their memory.

    Raises:
        ValueError: not a safetensors file, cut short, or with a misaligned tensor.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        head += file.read(min(int.from_bytes(head, "little"), _MAX_HEADER_BYTES))
    specs, _, data_start = _decode_header(Path(path), size, head)
    return {spec.name: (data_start + start, spec) for spec, start in zip(specs, _offsets(specs), strict=True)}


class TensorFile:
    """Tensors that lie in a shared mapping of one safetensors file.

    What one process writes into a view, every other process that has the file open reads at once; the caller orders
    writers and readers. Views stay valid after `close` and after the path is unlinked.
    """

    def __init__(self, path: str | os.PathLike[str], *, writable: bool = False) -> None:
        self.path = Path(path)
        with open(self.path, "r+b" if writable else "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise ValueError(f"{self.path} is not a safetensors file: {size} bytes")
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self._mapping = mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED, prot=protection)
        self.specs, self.metadata, self._data_start = _decode_header(self.path, size, self._mapping)
        with warnings.catch_warnings():  # a read-only mapping gives tensors that must not be written, as documented
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self._data = torch.frombuffer(self._mapping, dtype=torch.uint8)[self._data_start :]
        self._places = {s.name: (start, s) for s, start in zip(self.specs, _offsets(self.specs), strict=True)}

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        specs: Sequence[TensorSpec],
        metadata: dict[str, str] | None = None,
    ) -> "TensorFile":
        """Make a new file of zeros with this layout, readable by its owner alone, and open it for writing.

        Its whole space is reserved here, so that a later write into a view cannot run out of space (SIGBUS).

        Raises:
            FileExistsError: something exists at `path`.
            OSError: the file system has not enough space; nothing is left behind.
            ValueError: a repeated name, a dtype outside safetensors, or an order that misaligns a tensor.
        """
        header = _encode_header(specs, metadata or {})
        size = len(header) + sum(spec.num_bytes for spec in specs)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            os.pwrite(descriptor, header, 0)
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(descriptor)
        return cls(path, writable=True)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, writable: bool = False) -> "TensorFile":
        """Map an existing file.

        Without `writable` the mapping is read-only: writing into a view ends the process with SIGSEGV.

        Raises:
            ValueError: not a safetensors file, cut short, or with a misaligned tensor.
        """
        return cls(path, writable=writable)

    @property
    def names(self) -> list[str]:
        """Tensor names in file order."""
        return [spec.name for spec in self.specs]

    def view(self, name: str) -> Tensor:
        """The tensor itself, sharing memory with the file; KeyError for an unknown name."""
        start, spec = self._places[name]
        return self._data[start : start + spec.num_bytes].view(spec.dtype).view(spec.shape)

    def flush(self) -> None:
        """Write changed pages to the disk and wait."""
        self._mapping.flush()
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Let go of the mapping; it is unmapped once no view of it is left. The object cannot be used afterwards."""
        del self._data, self._mapping

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
