"""A safetensors file of fixed layout that several processes map and write in place.

The weight file of a run lies in shared memory: the trainer's ranks write their tensors into it, the inference
engines read it. The same class writes the Hugging Face export, since any safetensors reader opens the file.

Format: 8 bytes little-endian header length, JSON header, data without holes
(https://github.com/huggingface/safetensors#format). Safetensors sorts tensors by dtype; here they keep the caller's
order, so that tensors which another program fuses (q, k, v or gate, up) are adjacent.
"""

import json
import math
import mmap
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import xxhash
from torch import Tensor, set_num_threads  # the function itself: vLLM's CPU worker replaces torch's by a no-op

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

# Linear layers that inference engines fuse into one, in the order of their rows.
_FUSED: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

_ALIGNMENT_BYTES = 64  # of the data's start: a cache line, and enough for every vector load
_MAX_HEADER_BYTES = 100_000_000  # the safetensors limit


def adjacent_order(names: Iterable[str]) -> list[str]:
    """Hugging Face names reordered so that what inference engines fuse is adjacent: q, k, v and gate, up, biases apart.

    Everything else keeps its order. A file in this order is read without vLLM's loader (rollout/weight_transfer.py).
    """
    groups: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        parts = name.split(".")
        fused = next((group for group in _FUSED if not set(group).isdisjoint(parts)), ())
        place = next((i for i, part in enumerate(fused) if part in parts), 0)
        key = ".".join(fused[0] if part in fused else part for part in parts)
        groups.setdefault(key, []).append((place, name))
    return [name for group in groups.values() for _, name in sorted(group)]


Item = TypeVar("Item")
Result = TypeVar("Result")


def run_side_by_side(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> list[Result]:
    """The results of `function` in order, computed in threads whose own PyTorch operations use one core each.

    Many operations of a millisecond run faster next to each other than one after the other on all cores: no barrier
    within each, which costs a time slice wherever a core is busy with something else.
    """
    if threads == 1:
        return [function(item) for item in items]
    default = torch.get_num_threads()
    todo = list(enumerate(items))
    results: dict[int, Result] = {}
    left = iter(todo)  # shared: whichever thread is free takes the next

    def work() -> None:
        torch.get_num_threads()  # PyTorch sets a new thread's count at its first use, which must not come later
        set_num_threads(1)
        try:
            for index, item in left:
                results[index] = function(item)
        finally:
            deque(left, maxlen=0)  # after a failure no thread starts another

    try:
        with ThreadPoolExecutor(threads) as pool:
            for future in [pool.submit(work) for _ in range(threads)]:
                future.result()
    finally:
        set_num_threads(default)  # for threads that start later
    return [results[index] for index in range(len(todo))]


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

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data, without the header."""
        return self._data.numel()

    def view(self, name: str) -> Tensor:
        """The tensor itself, sharing memory with the file; KeyError for an unknown name."""
        start, spec = self._places[name]
        return self._data[start : start + spec.num_bytes].view(spec.dtype).view(spec.shape)

    def fused_view(self, names: Sequence[str]) -> Tensor | None:
        """One tensor over several that follow each other in the file, joined along dimension 0.

        None where they are not adjacent in this order, or differ in dtype or in the other dimensions.
        """
        specs = [self._places[name] for name in names]
        start, first = specs[0]
        rows, end = 0, start
        for place, spec in specs:
            if place != end or spec.dtype != first.dtype or not spec.shape or spec.shape[1:] != first.shape[1:]:
                return None
            rows, end = rows + spec.shape[0], end + spec.num_bytes
        return self._data[start:end].view(first.dtype).view(rows, *first.shape[1:])

    def digest(self, name: str) -> bytes:
        """XXH3-64 of one tensor's bytes, 8 bytes; cheapest right after the tensor was written, from the cache."""
        start, spec = self._places[name]
        start += self._data_start
        return xxhash.xxh3_64_digest(memoryview(self._mapping)[start : start + spec.num_bytes])

    def write(self, name: str, tensor: Tensor) -> bytes:
        """Copy a tensor of the same shape into the file, converting its dtype; returns its new digest."""
        view = self.view(name)
        if tensor.shape != view.shape:
            given, held = tuple(tensor.shape), tuple(view.shape)
            raise ValueError(f"tensor {name!r} has shape {given} where the file holds {held}")
        same_bytes = tensor.dtype == view.dtype and tensor.is_contiguous() and tensor.device.type == "cpu"
        if same_bytes:  # digested first, which brings into the cache what is then copied
            digest = xxhash.xxh3_64_digest(tensor.detach().view(-1).view(torch.uint8).numpy().data)
        view.copy_(tensor)
        return digest if same_bytes else self.digest(name)

    def checksum(self, digests: Mapping[str, bytes] | None = None) -> str:
        """32 hex digits over all data: XXH3-128 of the tensors' digests in file order.

        It tells a complete write from a partial or mixed one; it does not withstand an attacker.

        Args:
            digests: `digest` of every tensor, where the writers already have them; computed here if None.
        """
        if digests is None:
            computed = run_side_by_side(self.digest, self.names, torch.get_num_threads())
            digests = dict(zip(self.names, computed, strict=True))
        return xxhash.xxh3_128_hexdigest(b"".join(digests[name] for name in self.names))

    def flush(self) -> None:
        """Write changed pages to the disk and wait (of no use to a file in shared memory)."""
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
