"""Ranks of an actor without a model and engines without vLLM, which send and receive real buckets in a real group."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megarlhf.cluster.processes import Store
from megarlhf.cluster.weight_workers import ReceivesWeights, SendsWeights
from megarlhf.formats.buckets import Assembly, Bucket
from megarlhf.formats.shared_memory import Block, Piece
from megarlhf.parallel.bucket_stream import BucketStream, buckets_shape
from megarlhf.parallel.memory_handles import MemoryHandle, handle_of, open_memory, shareable_bytes
from megarlhf.parallel.weight_group import HandleGroup, Place, WeightGroup

ROWS = 30  # of 256 numbers: each sender has as many of the one tensor, in ten buckets of 4 KiB


def weights(version: int, num_senders: int) -> Tensor:
    """[num_senders * ROWS, 256]."""
    return torch.arange(num_senders * ROWS * 256, dtype=torch.float32).view(-1, 256) + version


class Faults:
    """A file beside the log says what happens at the fifth bucket, once."""

    def __init__(self, spec: SimpleNamespace) -> None:
        self._path = Path(spec.log_file).with_suffix(".fault")
        torch.set_num_threads(1)

    def at(self, number: int) -> None:
        if number == 4 and self._path.exists():
            fault = self._path.read_text()
            self._path.unlink()
            if fault == "raise":
                raise KeyError("no such tensor")
            os.kill(os.getpid(), {"die": signal.SIGKILL, "hang": signal.SIGSTOP}[fault])


class SendingWorker(SendsWeights):
    """Rank 2 has what rank 0 has, and sends nothing."""

    def __init__(self, spec: SimpleNamespace, store: Store) -> None:
        self._rank, self._faults = int(spec.name[-1]), Faults(spec)
        self._sent_weights: Any = self
        self._stage: WeightGroup | HandleGroup | None = None
        self._memory: Tensor | None = None
        self.awake = True

    def sleep(self, parts: Sequence[str]) -> None:
        self.awake = False

    def wake(self, parts: Sequence[str]) -> None:
        self.awake = True

    def offer_weights(self) -> list[Block]:
        if self._rank == 2:
            return []
        index = (slice(self._rank * ROWS, (self._rank + 1) * ROWS), slice(0, 256))
        piece = Piece(name="w", shape=(2 * ROWS, 256), index=index, offset=0, size=(ROWS, 256), stride=(256, 1))
        return [Block(length=ROWS * 256, dtype=torch.float32, pieces=(piece,))]

    def join(self, buckets: Sequence[Bucket], place: Place, *, num_senders: int | None) -> None:
        self._buckets, self._memory = buckets, None
        if self._stage is not None:
            self._stage.close()
        by_handle = num_senders is not None
        self._stage = HandleGroup(place, senders=place.among(num_senders)) if by_handle else WeightGroup(place)

    def open_buckets(self) -> MemoryHandle:
        self._memory = shareable_bytes(*buckets_shape(self._buckets))
        return handle_of(self._memory)

    def send(self, version: int) -> str | None:
        if self._stage is None:
            return None
        own = weights(version, 2)[self._rank * ROWS : (self._rank + 1) * ROWS]

        def fill(bucket: Bucket, memory: Tensor) -> None:
            bucket.fill(memory, lambda number: own)

        try:
            assert self.awake, "parameters are away"
            stream = BucketStream(self._buckets, self._stage, fill=fill, memory=self._memory)
            for number, _ in enumerate(stream):
                self._faults.at(number)
            return stream.confirm(version)
        except BaseException:
            self._stage.close()
            raise
        finally:
            self._memory = None


class ReceivingWorker(ReceivesWeights):
    """What it has received is `found`; None after an update that failed."""

    def __init__(self, spec: SimpleNamespace, store: Store) -> None:
        self._faults = Faults(spec)
        self._stage: WeightGroup | HandleGroup | None = None
        self._found: Tensor | None = None
        self.engine: Any = self

    def start(self) -> None: ...

    def join_weights(self, buckets: Sequence[Bucket], place: Place, by_handle: bool) -> None:
        self._buckets = buckets
        if self._stage is not None:
            self._stage.close()
        self._stage = HandleGroup(place, senders=None) if by_handle else WeightGroup(place)

    def update_weights(self, version: int, checksum: str, handles: Sequence[MemoryHandle] = ()) -> dict[str, Any]:
        assert self._stage is not None and checksum == ""
        self._found, assembly, tensors = None, Assembly(), dict[str, Tensor]()
        memory = open_memory(handles[0]) if handles else None
        stream = BucketStream(self._buckets, self._stage, memory=memory)
        try:
            for number, (bucket, memory) in enumerate(stream):
                self._faults.at(number)
                tensors |= assembly.take(bucket, memory)
            found = stream.confirm(version)
        except BaseException:
            self._stage.close()
            raise
        self._found = tensors["w"]
        return {"version": version, "checksum": found}

    def found(self) -> list[float] | None:
        """First number of each row."""
        return None if self._found is None else self._found[:, 0].tolist()
