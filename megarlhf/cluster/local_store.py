"""Values in shared memory that child processes of this machine pass to each other by reference.

Memory has no name in a file system: whoever has it open finds it by its descriptor, /proc/<process>/fd/<descriptor>,
which only processes of the same user can. So it goes when the last one that has it open or mapped lets it go or ends,
however that ends.
"""

import io
import mmap
import os
import pickle
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_ALIGNMENT_BYTES = 64  # of each array: a cache line, and enough for every vector load


class _Memory:
    """Shared memory, open in this process for as long as this object lives; where it is sent, it is opened too.

    So a sender keeps it until the receiver has it.

    Args:
        referred: other memory that references in this memory lead to.
    """

    def __init__(self, descriptor: int, referred: Sequence["_Memory"] = ()) -> None:
        self.descriptor, self._referred = descriptor, referred
        weakref.finalize(self, os.close, descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (f"/proc/{os.getpid()}/fd/{self.descriptor}",)

    @cached_property
    def content(self) -> memoryview:
        """All of it, for reading; arrays over it keep it."""
        return memoryview(mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ))


def _open(path: str) -> _Memory:
    return _Memory(os.open(path, os.O_RDONLY))


@dataclass(frozen=True)
class Reference:
    """Where a value is."""

    memory: _Memory
    spans: tuple[tuple[int, int], ...]  # start and stop of its pickle, and of each of its buffers


class _Pickler(pickle.Pickler):
    """Notes the memory that is referred to."""

    def __init__(self, file: io.BytesIO, buffers: list[pickle.PickleBuffer], referred: list[_Memory]) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers.append)
        self._referred = referred

    def reducer_override(self, value: Any) -> Any:
        """Pickle as usual."""
        if isinstance(value, _Memory):
            self._referred.append(value)
        return NotImplemented


class LocalStore:
    """See Store."""

    def put(self, values: Sequence[Any]) -> list[Reference]:
        """See Store; the values of one call share their memory, and stay as long as one of them is wanted."""
        descriptor, referred, places = os.memfd_create("megarlhf"), list[_Memory](), []
        with open(descriptor, "wb", closefd=False) as memory:
            for value in values:
                pickled, buffers, spans = io.BytesIO(), list[pickle.PickleBuffer](), []
                _Pickler(pickled, buffers, referred).dump(value)
                for part in (pickled.getbuffer(), *(buffer.raw() for buffer in buffers)):
                    start = memory.seek(-(-memory.tell() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
                    memory.write(part)
                    spans.append((start, start + part.nbytes))
                places.append(tuple(spans))
        region = _Memory(descriptor, referred)
        return [Reference(region, spans) for spans in places]

    def get(self, references: Sequence[Reference]) -> list[Any]:
        """See Store."""
        found = []
        for reference in references:
            pickled, *buffers = (reference.memory.content[start:stop] for start, stop in reference.spans)
            found.append(pickle.loads(pickled, buffers=buffers))
        return found
