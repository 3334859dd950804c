"""How the actor's weights reach the inference engines: WeightSyncRole over groups of worker processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from megarlhf.cluster.group import WorkerGroup, wait_for_each
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.roles import ROLES
from megarlhf.formats.buckets import plan_buckets, senders_of
from megarlhf.formats.shared_memory import SharedBlock, checksum
from megarlhf.parallel.weight_group import LostMemberError, Place
from megarlhf.planner.transport import Transport
from megarlhf.trainers.roles import WeightSyncRole


class WeightSync(WeightSyncRole, Protocol):
    """Also for engines that start in the middle of a run."""

    def restore(self, engine: int) -> None:
        """Give an engine that has just started the weights of the last push, which the actor has not changed since.

        Raises:
            RuntimeError: it reports others.
        """


def weight_sync(actor: WorkerGroup, rollout: WorkerGroup, config: PPOConfig, transport: Transport) -> WeightSync:
    """The transport of a plan; nothing else knows which there are."""
    if transport.name == "shared_memory":
        return SharedMemorySync(actor, rollout)
    return BucketSync(
        actor,
        rollout,
        one_host=transport.one_host,
        workers_per_engine=config.cluster.vllm_tensor_parallel_size,
        bucket_bytes=config.cluster.update_weight_buffer_mib * 2**20,
        timeout_seconds=60 * ROLES["actor"].layout(config).distributed_timeout_minutes,
        by_handle=transport.name == "ipc",
        colocated=config.cluster.colocate_all_models,
    )


class SharedMemorySync:
    """Weights are read where the actor's ranks hold them: in shared memory, from the first sync on."""

    def __init__(self, actor: WorkerGroup, rollout: WorkerGroup) -> None:
        self.actor, self.rollout = actor, rollout
        self._connected: int | None = None  # loads of the engines that are
        self._blocks: list[SharedBlock] = []
        self._sent = 0, ""  # version and checksum of the last push

    def push(self, version: int) -> dict[str, float]:
        """See WeightSyncRole.

        Raises:
            RuntimeError: an engine reports another version or checksum than was sent.
        """
        if not self._blocks:
            self._blocks = [block for part in self.actor.call("share_weights") for block in part]
        if self._connected != self.rollout.loads:
            self.rollout.call("connect_weights", self._blocks)
            self._connected = self.rollout.loads
        sent = checksum(digest for part in self.actor.call("refresh_shared_weights") for digest in part)
        self._sent = version, sent
        for engine, reply in enumerate(self.rollout.call("update_weights", version, sent)):
            check_reply(engine, reply, version, sent)
        num_bytes = sum(block.num_bytes for block in self._blocks)
        return {"sync/version": float(version), "sync/bytes": float(num_bytes)}

    def restore(self, engine: int) -> None:
        """See WeightSync."""
        for method, arguments in (("connect_weights", (self._blocks,)), ("update_weights", self._sent)):
            call = self.rollout.submit_to(engine, method, *arguments)
            (reply,) = self.rollout.wait_for([call], method, ranks=[engine])
        check_reply(engine, reply, *self._sent)


class BucketSync:
    """Ranks of the actor, of those with the same weights one, send them in buckets to all workers of all engines.

    They meet in a group at the first push, and again where an engine is another one than before or a push has failed.

    Args:
        by_handle: ranks send the buckets to each other, and engines read them in the memory of the rank that shares
            their device.
        colocated: the actor's parameters are away while engines answer.
    """

    def __init__(
        self,
        actor: WorkerGroup,
        rollout: WorkerGroup,
        *,
        one_host: bool,
        workers_per_engine: int,
        bucket_bytes: int,
        timeout_seconds: float,
        by_handle: bool,
        colocated: bool,
    ) -> None:
        self.actor, self.rollout = actor, rollout
        self._one_host, self._workers_per_engine = one_host, workers_per_engine
        self._bucket_bytes, self._timeout_seconds, self._colocated = bucket_bytes, timeout_seconds, colocated
        self._by_handle = by_handle
        self._joined: tuple[list[int], int] | None = None  # engines in the group, and their loads
        self._senders: list[int] = []
        self._buckets: Any = None  # reference to those of all senders
        self._num_bytes = 0
        self._version = 0

    def push(self, version: int) -> dict[str, float]:
        """See WeightSyncRole.

        Raises:
            WorkerFailedError: of the process at fault; engines that have seen a part of the weights generate nothing.
            RuntimeError: an engine reports another version or checksum than was sent.
        """
        self._version = version
        self._send(range(len(self.rollout.handles)))
        return {"sync/version": float(version), "sync/bytes": float(self._num_bytes)}

    def restore(self, engine: int) -> None:
        """See WeightSync. The senders and this engine are a group, until the next push."""
        with self._parameters_awake():
            self._send([engine])

    @contextmanager
    def _parameters_awake(self) -> Iterator[None]:
        if not self._colocated:
            yield
            return
        self.actor.call("wake", ("parameters",))
        yield
        self.actor.call("sleep", ("parameters",))

    def _send(self, engines: Sequence[int]) -> None:
        group = list(engines), self.rollout.loads
        if self._joined != group:
            self._join(engines)
        self._joined, version = None, self._version  # a group that has failed is left by all
        (handles,) = self.rollout.put([self.actor.call("open_buckets") if self._by_handle else []])
        receiving = {e: self.rollout.submit_to(e, "update_weights", version, "", handles) for e in engines}
        sending = dict(enumerate(self.actor.submit("send_weights", version)))
        calls = [(self.actor, "send_weights", sending), (self.rollout, "update_weights", receiving)]
        checksums, replies = wait_for_each(calls, noticing=LostMemberError)
        sent = checksums[self._senders[0]]
        for engine, reply in zip(engines, replies, strict=True):
            check_reply(engine, reply, version, sent)
        self._joined = group

    def _join(self, engines: Sequence[int]) -> None:
        if self._buckets is None:
            held = self.actor.call("offer_weights")
            self._senders = senders_of(held, by_handle=self._by_handle)
            buckets = plan_buckets([held[rank] for rank in self._senders], most_bytes=self._bucket_bytes)
            self._num_bytes = sum(block.num_bytes for blocks in held for block in blocks)
            (self._buckets,) = self.actor.put([buckets])
        opening = self.actor.submit_to(self._senders[0], "open_weight_meeting", self._one_host)
        (meeting,) = self.actor.wait_for([opening], "open_weight_meeting", ranks=self._senders[:1])
        first, each = len(self._senders), self._workers_per_engine

        def place(rank: int) -> Place:
            size, limit = first + len(engines) * each, self._timeout_seconds
            return Place(meeting=meeting, rank=rank, size=size, timeout_seconds=limit)

        num_senders = first if self._by_handle else None
        senders = {
            rank: self.actor.submit_to(rank, "join_weights", self._buckets, place(number), num_senders)
            for number, rank in enumerate(self._senders)
        }
        receivers = {
            engine: self.rollout.submit_to(engine, "join_weights", self._buckets, place(at), self._by_handle)
            for engine, at in zip(engines, range(first, first + len(engines) * each, each), strict=True)
        }
        calls = [(self.actor, "join_weights", senders), (self.rollout, "join_weights", receivers)]
        wait_for_each(calls, noticing=LostMemberError)


def check_reply(engine: int, reply: dict[str, Any], version: int, sent: str) -> None:
    """Raises RuntimeError where an engine reports another version or checksum than was sent."""
    if (reply["version"], reply["checksum"]) != (version, sent):
        raise RuntimeError(
            f"rollout engine {engine} holds weights version {reply['version']} with checksum "
            f"{reply['checksum']}; version {version} with {sent} was sent"
        )
