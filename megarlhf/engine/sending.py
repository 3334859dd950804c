"""A rank's weights on their way to inference engines that see none of its memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.sharing import pieces_of
from megarlhf.formats.buckets import Bucket
from megarlhf.formats.shared_memory import Block
from megarlhf.models.four_bit import dense_like
from megarlhf.models.weights import LocalWeight, ModelWeights
from megarlhf.parallel.bucket_stream import BucketStream, buckets_shape
from megarlhf.parallel.memory_handles import MemoryHandle, handle_of, shareable_bytes
from megarlhf.parallel.weight_group import HandleGroup, Place, WeightGroup


def blocks_to_send(weights: ModelWeights) -> list[tuple[LocalWeight, Block]]:
    """What a rank sends of the weights, parameter by parameter: nothing, where another one has the same."""
    places = {name: place for place, name in enumerate(weights.hf_names())}
    owned = [(local, pieces_of(weights, local)) for local in weights.owned_weights(share=False)]
    return [
        (
            local,
            Block(
                length=dense_like(local.param).numel(),
                dtype=dense_like(local.param).dtype,
                pieces=tuple(pieces),
                position=places[pieces[0].name],
            ),
        )
        for local, pieces in owned
        if pieces  # not padding alone
    ]


class SentWeights:
    """What this rank sends of the weights.

    Attributes:
        blocks: what its buckets are cut from.
    """

    def __init__(self, engine: MegatronEngine) -> None:
        self._engine = engine
        self._buckets: Sequence[Bucket] = []
        self._group: WeightGroup | HandleGroup | None = None
        self._memory: Tensor | None = None
        held = blocks_to_send(engine.weights)
        self._local = [local for local, _ in held]
        self.blocks = [block for _, block in held]
        self._read: tuple[int, Tensor] | None = None  # number and numbers of the block that was read last

    def join(self, buckets: Sequence[Bucket], place: Place, *, num_senders: int | None = None) -> None:
        """Meet the other senders and the engines; a group of before is left.

        Args:
            num_senders: where engines read buckets in the senders' memory; None: they are sent there.
        Raises:
            LostMemberError: they did not come in time.
        """
        self.leave()
        self._buckets = buckets
        if num_senders is None:
            self._group = WeightGroup(place)
        else:
            self._group = HandleGroup(place, senders=place.among(num_senders))

    def leave(self) -> None:
        """Close the group."""
        if self._group is not None:
            self._group.close()
        self._group = None

    def open_buckets(self) -> MemoryHandle:
        """Memory for the buckets of the next `send`, for engines on this rank's device."""
        self._memory = shareable_bytes(*buckets_shape(self._buckets))
        return handle_of(self._memory)

    @torch.no_grad()
    def send(self, version: int) -> str | None:
        """Send the weights as they are now; all ranks call it, also those that send nothing.

        Beside the two buckets it takes the memory of one parameter where adapters are merged, or 4 bits unpacked.

        Returns:
            Checksum of what was sent; None on a rank that has sent nothing.
        Raises:
            LostMemberError: another member of the group died or did not come in time.
        """
        try:
            self._engine.finish_param_gather()
            if self._group is None:
                assert not self.blocks, "join comes first, and again after a send that failed"
                return None
            stream = BucketStream(self._buckets, self._group, fill=self._fill, memory=self._memory)
            for _ in stream:  # what other senders send comes by
                continue
            return stream.confirm(version)
        except BaseException:
            self.leave()
            raise
        finally:
            self._read = self._memory = None

    def _fill(self, bucket: Bucket, memory: Tensor) -> None:
        bucket.fill(memory, self._block)

    def _block(self, number: int) -> Tensor:
        """Numbers of a block as engines are to see them."""
        if self._read is None or self._read[0] != number:
            self._read = None  # its memory is free before the next is made
            local, adapters = self._local[number], self._engine.adapters
            self._read = number, (local.data if adapters is None else adapters.merged(local))
        return self._read[1]
