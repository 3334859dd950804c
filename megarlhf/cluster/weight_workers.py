"""What worker processes do for weights on their way to the engines, as cluster/weight_sync.py asks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megarlhf.formats.buckets import Bucket
from megarlhf.formats.shared_memory import Block, SharedBlock
from megarlhf.parallel.memory_handles import MemoryHandle
from megarlhf.parallel.weight_group import Meeting, Place, open_meeting

if TYPE_CHECKING:  # seconds: workers import them when they start
    from megarlhf.engine.engine import MegatronEngine
    from megarlhf.rollout.engine import RolloutEngine


class SendsWeights:
    """A rank of the actor."""

    engine: "MegatronEngine"

    def share_weights(self) -> list[SharedBlock]:
        """Hold this rank's part of the weights in shared memory from now on; what lies where."""
        from megarlhf.engine.sharing import SharedWeights

        self._shared_weights = SharedWeights(self.engine)
        return self._shared_weights.blocks

    def refresh_shared_weights(self) -> list[bytes]:
        """After share_weights: the digests of this rank's blocks, which hold the present weights until it trains on."""
        return self._shared_weights.refresh()

    def offer_weights(self) -> list[Block]:
        """What this rank is to send of the weights to engines elsewhere."""
        from megarlhf.engine.sending import SentWeights

        self._sent_weights = SentWeights(self.engine)
        return self._sent_weights.blocks

    def open_weight_meeting(self, one_host: bool) -> Meeting:
        """A place to meet for those who send and those who receive."""
        self._meeting_store, meeting = open_meeting(one_host=one_host)
        return meeting

    def join_weights(self, buckets: Sequence[Bucket], place: Place, num_senders: int | None) -> None:
        """See SentWeights.join."""
        self._sent_weights.join(buckets, place, num_senders=num_senders)

    def open_buckets(self) -> MemoryHandle:
        """See SentWeights.open_buckets."""
        return self._sent_weights.open_buckets()

    def send_weights(self, version: int) -> str | None:
        """See SentWeights.send."""
        return self._sent_weights.send(version)


class ReceivesWeights:
    """An inference engine."""

    engine: "RolloutEngine"

    def connect_weights(self, blocks: Sequence[SharedBlock]) -> None:
        """See RolloutEngine.connect_weights."""
        self.engine.connect_weights(blocks)

    def join_weights(self, buckets: Sequence[Bucket], place: Place, by_handle: bool) -> None:
        """See RolloutEngine.join_weights."""
        self.engine.join_weights(buckets, place, by_handle=by_handle)

    def update_weights(self, version: int, checksum: str, handles: Sequence[MemoryHandle] = ()) -> dict[str, Any]:
        """See RolloutEngine.update_weights."""
        return self.engine.update_weights(version, checksum, handles)
