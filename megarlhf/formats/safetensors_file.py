"""A safetensors file of fixed layout that several processes map and write in place.

The ranks of a run write a Hugging Face export together, each its own parts; any safetensors reader opens the file.

Format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, JSON header, data
without holes. Safetensors sorts tensors by dtype; here they keep the caller's order.
"""

import json
import math
import mmap
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import _TYPES
from torch import Tensor

from megarlhf.formats.staging import sync

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


class TensorFile(AbstractContextManager["TensorFile"]):
    """Tensors that lie in a shared mapping of one safetensors file, to be read and written.

    What one process writes into a view, every other process that has the file open reads at once; the caller orders
    writers and readers. Views stay valid after `close` and after the path is unlinked.

    Raises:
        ValueError: see tensor_places.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._places = Path(path), tensor_places(path)
        with open(path, "r+b") as file:
            self._mapping = mmap.mmap(file.fileno(), 0)
        self._bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)

    @classmethod
    def create(cls, path: str | os.PathLike[str], specs: Sequence[TensorSpec]) -> "TensorFile":
        """Make a new file of zeros with this layout, readable by its owner alone, and open it.

        Its whole space is reserved here, so that a later write into a view cannot run out of space (SIGBUS).

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
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(descriptor)
        return cls(path)

    @property
    def names(self) -> list[str]:
        """Tensor names in file order."""
        return list(self._places)

    def view(self, name: str) -> Tensor:
        """The tensor itself, sharing memory with the file; KeyError for an unknown name."""
        start, spec = self._places[name]
        return self._bytes[start : start + spec.num_bytes].view(spec.dtype).view(spec.shape)

    def flush(self) -> None:
        """Write changed pages to the disk and wait."""
        self._mapping.flush()
        sync(self.path)

    def close(self) -> None:
        """Let go of the mapping; it is unmapped once no view of it is left. The object cannot be used afterwards."""
        del self._bytes, self._mapping

    def __exit__(self, *error: object) -> None:
        self.close()
