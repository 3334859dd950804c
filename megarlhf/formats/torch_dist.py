"""Megatron-Core's checkpoint format on disk (torch_dist), read and written piece by piece.

A directory of PyTorch's distributed checkpoint: `.metadata`, a pickle that says which box of which tensor lies where,
and `*.distcp` files, which hold one `torch.save` after the other. Needs neither ranks nor the whole model in memory.
"""

import math
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.utils import _create_file_view

from megarlhf.formats.shared_memory import bytes_of

METADATA = ".metadata"
_STRATEGIES = "megatron.core.dist_checkpointing.strategies.torch"
_MEGATRON = [(_STRATEGIES, "MCoreMetadata"), (_STRATEGIES, "MCoreSavePlan")]  # Megatron-Core's additions
Place = tuple[str, int, int]  # file, first byte, number of bytes


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the classes that a checkpoint's metadata is made of, and runs nothing else that a pickle may name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _MEGATRON:
            return type(name, (), {})  # of which nothing is read
        if module.startswith("torch.distributed.checkpoint.") and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        known = {"torch.serialization": {"_get_layout"}, "collections": {"OrderedDict"}, "pathlib": {"PosixPath"}}
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        if is_type or (module, name) == ("torch", "Size") or name in known.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class TorchDistReader:
    """Tensors of a distributed checkpoint by key, whatever layout it was written in.

    Args:
        source: option and value that gave the directory, for messages.
    Raises:
        ValueError: no readable metadata, or files that are missing or cut short.
    """

    def __init__(self, directory: Path, source: str) -> None:
        self.directory, self.source = directory, source
        try:
            with open(directory / METADATA, "rb") as file:
                metadata = _MetadataUnpickler(file).load()
            entries: dict[str, Any] = metadata.state_dict_metadata
            self.tensors = {k: entry for k, entry in entries.items() if isinstance(entry, dcp.TensorStorageMetadata)}
            storage: dict[dcp.MetadataIndex, _StorageInfo] = metadata.storage_data
        except (OSError, EOFError, AttributeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{source}; {directory / METADATA} cannot be read: {error}") from error
        self.num_objects = len(entries) - len(self.tensors)
        self._check_files(storage.values())
        self._places = {(i.fqn, tuple(i.offset)): info for i, info in storage.items() if i.offset is not None}
        self._by_stack: dict[tuple[str, int], dict[tuple[int, ...], list[dcp.ChunkStorageMetadata]]] = {}

    def _check_files(self, entries: Iterable[_StorageInfo]) -> None:
        ends: dict[str, int] = defaultdict(int)
        for entry in entries:
            ends[entry.relative_path] = max(ends[entry.relative_path], entry.offset + entry.length)
        sizes = {name: (self.directory / name).stat().st_size for name in ends if (self.directory / name).is_file()}
        missing = sorted(ends.keys() - sizes.keys())
        short = [f"{name} has {size} of {ends[name]} bytes" for name, size in sizes.items() if size < ends[name]]
        problems = [f"missing files {missing}"] if missing else []
        problems += [f"files cut short: {', '.join(short)}"] if short else []
        if problems:
            raise ValueError(f"{self.source}; {self.directory}: " + "; ".join(problems))

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that a tensor is stored in."""
        return self.tensors[key].properties.dtype

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int], num_stacked: int) -> Tensor:
        """A box of a tensor, put together from the chunks that overlap it.

        Args:
            num_stacked: leading axes along which the box has one element; the result lacks them.
        Raises:
            ValueError: the chunks leave a hole, or one of them cannot be read.
        """
        whole, filled = None, 0
        for chunk in self._near(key, tuple(offset[:num_stacked])):
            starts = [max(o, c) for o, c in zip(offset, chunk.offsets, strict=True)]
            ends = [min(o + s, c + d) for o, s, c, d in zip(offset, shape, chunk.offsets, chunk.sizes, strict=True)]
            if any(end <= start for start, end in zip(starts, ends, strict=True)):
                continue
            inside = [slice(s - c, e - c) for s, e, c in zip(starts, ends, chunk.offsets, strict=True)]
            part = self._load(key, chunk)[tuple(inside)]
            if part.shape == torch.Size(shape):
                return part.view(part.shape[num_stacked:])
            whole = torch.empty(*shape, dtype=part.dtype) if whole is None else whole
            whole[tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, offset, strict=True))] = part
            filled += part.numel()
        if whole is None or filled != math.prod(shape):
            raise ValueError(f"{self.source}; the chunks of {key} hold {filled} of {math.prod(shape)} numbers")
        return whole.view(whole.shape[num_stacked:])

    def _near(self, key: str, stacked: tuple[int, ...]) -> list[dcp.ChunkStorageMetadata]:
        """Chunks at a place of the leading axes; tensors of many layers and experts have thousands."""
        index = self._by_stack.get((key, len(stacked)))
        if index is None:
            index = defaultdict(list)
            for chunk in self.tensors[key].chunks:
                axes = zip(chunk.offsets, chunk.sizes, strict=True)
                for place in product(*(range(o, o + s) for o, s in list(axes)[: len(stacked)])):
                    index[place].append(chunk)
            self._by_stack[key, len(stacked)] = index
        return index.get(stacked, [])

    def _load(self, key: str, chunk: dcp.ChunkStorageMetadata) -> Tensor:
        place = self._places[key, tuple(chunk.offsets)]
        if place.transform_descriptors:
            raise ValueError(f"{self.source}; {key} is stored as {place.transform_descriptors}, which is not read here")
        try:
            with open(self.directory / place.relative_path, "rb", buffering=0) as file:
                view = _create_file_view(file, place.offset, place.length)
                tensor: Tensor = torch.load(view, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).partition(".")[0]
            raise ValueError(f"{self.source}; {place.relative_path} is damaged at {key}: {reason}") from error
        return tensor.view(chunk.sizes)


def write_tensor(file: BinaryIO, tensor: Tensor) -> tuple[int, int]:
    """Append a tensor to a `.distcp` file; its first byte there and the number of bytes."""
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        # torch.save writes a storage whole: make one of these bytes alone, copied where they do not lie together.
        tensor = torch.frombuffer(bytes_of(tensor.contiguous()), dtype=tensor.dtype).view(tensor.shape)
    return _append(file, tensor)


def _append(file: BinaryIO, value: Any) -> tuple[int, int]:
    start = file.tell()
    torch.save(value, file)
    return start, file.tell() - start


def write_objects(directory: Path, name: str, objects: dict[str, Any]) -> dict[str, Place]:
    """Write what Megatron-Core stores besides tensors, each as it does itself: in a list of one."""
    with open(directory / name, "wb") as file:
        return {key: (name, *_append(file, [value])) for key, value in objects.items()}


def write_metadata(
    directory: Path,
    tensors: Mapping[str, tuple[Sequence[int], torch.dtype]],
    chunks: Iterable[tuple[str, Sequence[int], Sequence[int], Place]],
    objects: Mapping[str, Place],
) -> None:
    """Say what lies where: tensors by shape and dtype; chunks by key, offset, shape and place, in any order."""
    entries: dict[str, Any] = {key: dcp.BytesStorageMetadata() for key in objects}
    storage = {dcp.MetadataIndex(key): _StorageInfo(*place) for key, place in objects.items()}
    for key, (shape, dtype) in tensors.items():
        entries[key] = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=dtype), torch.Size(shape), chunks=[])
    for key, offset, shape, place in sorted(chunks, key=lambda chunk: (chunk[0], tuple(chunk[1]))):
        found = entries[key].chunks
        storage[dcp.MetadataIndex(key, torch.Size(offset), len(found))] = _StorageInfo(*place)
        found.append(dcp.ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(shape)))
    metadata = dcp.Metadata(state_dict_metadata=entries, storage_data=storage)
    (directory / METADATA).write_bytes(pickle.dumps(metadata))
