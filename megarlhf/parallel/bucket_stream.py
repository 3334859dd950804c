"""Buckets of weights from the ranks that hold them to every member of a group, two at a time, with their digests."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megarlhf.formats.buckets import Bucket, Digester, digest_bytes
from megarlhf.formats.shared_memory import checksum
from megarlhf.parallel.weight_group import Carrier

NUM_IN_FLIGHT = 2

Fill = Callable[[Bucket, Tensor], None]


def buckets_shape(buckets: Sequence[Bucket]) -> tuple[int, int]:
    """Buckets in flight, and bytes of the largest."""
    return NUM_IN_FLIGHT, max(bucket.num_bytes for bucket in buckets)


class BucketStream:
    """One version of the weights on its way, as one member of the group sees it. Each version has a stream of its own.

    It takes the memory of two buckets, however large the weights are.

    Args:
        buckets: those of all senders, who are the first members, in the same order everywhere.
        fill: puts a bucket's numbers into its memory; None for members that send nothing.
        memory: for buckets_shape(buckets); None: new.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        group: Carrier,
        *,
        fill: Fill | None = None,
        memory: Tensor | None = None,
    ) -> None:
        self._buckets, self._group, self._fill = buckets, group, fill
        if memory is None:
            memory = torch.empty(buckets_shape(buckets), dtype=torch.uint8, device=group.device)
        self._memory = memory
        self._digest = Digester(group.device)
        self._digests = torch.zeros(len(buckets) + 1, dtype=torch.int64, device=group.device)  # and the version

    @property
    def num_bytes(self) -> int:
        """What it takes beside the weights."""
        return self._memory.nbytes

    def __iter__(self) -> Iterator[tuple[Bucket, Tensor]]:
        """Each bucket when it is there, and its bytes, valid until the next is asked for.

        Raises:
            LostMemberError: another member died or did not come in time.
        """
        on_the_way = deque[tuple[int, Tensor, Any]]()
        for number, bucket in enumerate(self._buckets):
            if len(on_the_way) == NUM_IN_FLIGHT:
                yield self._arrived(*on_the_way.popleft())
                self._group.taken()
            memory = self._memory[number % NUM_IN_FLIGHT, : bucket.num_bytes]
            if self._is_mine(bucket):
                assert self._fill is not None
                self._fill(bucket, memory)
                self._digests[number] = self._digest(memory)
            on_the_way.append((number, memory, self._group.broadcast(memory, bucket.sender)))
        while on_the_way:
            yield self._arrived(*on_the_way.popleft())
            self._group.taken()

    def _arrived(self, number: int, memory: Tensor, work: Any) -> tuple[Bucket, Tensor]:
        self._group.wait(work)
        if self._fill is None:
            self._digests[number] = self._digest(memory)
        return self._buckets[number], memory

    def _is_mine(self, bucket: Bucket) -> bool:
        return bucket.sender == self._group.place.rank

    def confirm(self, version: int) -> str:
        """After the last bucket: what was sent is what has come; all members call it.

        Args:
            version: this member's.
        Returns:
            Checksum over the digests of all buckets, alike for all members.
        Raises:
            ValueError: bytes, or the version, are others than the senders'.
        """
        sent = self._digests.clone()
        is_first = self._group.place.rank == 0
        sent[-1] = version if is_first else 0
        if self._fill is None:
            sent.zero_()
        self._group.add_up(sent)  # each digest is its sender's alone
        *digests, sent_version = sent.tolist()
        found = digests if self._fill is not None else self._digests[:-1].tolist()
        if (found, version) != (digests, sent_version):
            raise ValueError(
                f"checksum={checksum(digest_bytes(digests))} of weight version {sent_version} does not match "
                f"{checksum(digest_bytes(found))} of version {version}, computed from what has arrived"
            )
        return checksum(digest_bytes(digests))
