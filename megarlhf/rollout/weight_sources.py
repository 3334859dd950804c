"""Where an engine's worker takes new weights from: the trainer's shared memory, or a group in which they are sent.

Two ways lead into a model, with equal results: directly (rollout/direct_update.py), where the memory can be read again
and again and vLLM keeps packed copies; and by vLLM's reload (rollout/reload.py), everywhere else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo
from vllm.platforms import current_platform
from vllm.utils.nccl import unpinned_nccl_env

from megarlhf.formats.buckets import Assembly, Bucket
from megarlhf.formats.shared_memory import SharedBlock, SharedTensors, checksum
from megarlhf.formats.threads import map_threads
from megarlhf.parallel.bucket_stream import BucketStream
from megarlhf.parallel.memory_handles import MemoryHandle, device_name, open_memory
from megarlhf.parallel.weight_group import HandleGroup, Place, WeightGroup
from megarlhf.rollout.direct_update import DirectPlan, plan_direct_update, update_directly
from megarlhf.rollout.reload import reload_weights

Way = Literal["direct", "loader"]


@dataclass
class WeightsUpdate(WeightTransferUpdateInfo):
    """One version of the weights."""

    version: int  # policy version, reported back
    checksum: str  # by the trainer; "" where it comes with the weights
    handles: list[MemoryHandle]  # of the buckets' memory on the trainer's devices; empty where they are sent


class WeightSource(Protocol):
    """What an update reads."""

    way: Way

    def update(self, worker: Any, sent: WeightsUpdate, *, begin: Callable[[], None]) -> str:
        """Replace the weights of a worker's `model`.

        Args:
            begin: is called before anything of the model changes.
        Returns:
            The checksum of what was read.
        Raises:
            ValueError: checksum or version are others than the trainer's.
            RuntimeError: weights of the model were not sent, or their sender is lost.
        """

    def close(self) -> None:
        """Read nothing any more."""


class SharedMemorySource:
    """Blocks of the trainer's ranks on this host, mapped once: mapping anew would fault in every page again.

    Args:
        directly: whether this worker's model can be updated without vLLM's loaders, as far as its layers can.
    """

    def __init__(self, worker: Any, blocks: Sequence[SharedBlock], *, directly: bool) -> None:
        self._tensors = SharedTensors(blocks)
        self._plan: DirectPlan | None = plan_direct_update(worker.model, self._tensors) if directly else None
        self.way: Way = "loader" if self._plan is None else "direct"

    def update(self, worker: Any, sent: WeightsUpdate, *, begin: Callable[[], None]) -> str:
        """See WeightSource. After a ValueError the model has its weights still."""
        tensors = self._tensors

        def verify(digests: Sequence[bytes]) -> None:
            if (found := checksum(digests)) != sent.checksum:
                raise ValueError(
                    f"checksum={sent.checksum} of weight version {sent.version} does not match {found}, computed from "
                    "the shared memory: the weights changed since the trainer's checksum"
                )
            begin()

        if self._plan is not None:
            update_directly(worker.model, tensors, self._plan, begin=verify)
        else:
            verify(map_threads(tensors.digest, range(len(tensors.blocks)), torch.get_num_threads()))
            reload_weights(worker.model, worker.model_config, ((name, tensors.read(name)) for name in tensors.names))
        return sent.checksum

    def close(self) -> None:
        """Unmap the memory."""
        del self._tensors, self._plan


class BucketSource:
    """Buckets that the trainer's ranks send to the workers of all engines, or gather where the workers read them.

    What has come is loaded before the last bucket is there, so that the memory of two buckets and of the layer that is
    not complete yet is enough. After any error the model has a mixture.

    Raises:
        LostMemberError: the others did not come in time.
    """

    way: Way = "loader"

    def __init__(self, buckets: Sequence[Bucket], place: Place, *, by_handle: bool) -> None:
        self._buckets = buckets
        with _environment_of_all():
            self._group = HandleGroup(place, senders=None) if by_handle else WeightGroup(place)

    def update(self, worker: Any, sent: WeightsUpdate, *, begin: Callable[[], None]) -> str:
        """See WeightSource."""
        begin()
        try:
            memory = open_memory(own_handle(sent.handles)) if sent.handles else None
            stream = BucketStream(self._buckets, self._group, memory=memory)
            reload_weights(worker.model, worker.model_config, _tensors(stream))
            return stream.confirm(sent.version)
        except BaseException:
            self.close()  # else the others would wait for this one
            raise

    def close(self) -> None:
        """Leave the group."""
        self._group.close()


def own_handle(handles: Sequence[MemoryHandle]) -> MemoryHandle:
    """That of this process's device.

    Raises:
        RuntimeError: no rank of the actor has it.
    """
    own = device_name()
    for handle in handles:
        if handle.device == own:
            return handle
    raise RuntimeError(f"no rank of the actor is on this engine's device {own}, but on {[h.device for h in handles]}")


def _tensors(stream: BucketStream) -> Iterator[tuple[str, Tensor]]:
    assembly = Assembly()
    for bucket, memory in stream:
        yield from assembly.take(bucket, memory)


def _environment_of_all() -> AbstractContextManager[None]:
    """Without the variables that vLLM pins for its own groups: all members must have the same."""
    return nullcontext() if current_platform.is_cpu() else unpinned_nccl_env()
