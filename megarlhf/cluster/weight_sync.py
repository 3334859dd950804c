"""How the actor's weights reach the inference engines: WeightSyncRole over groups of worker processes."""

from collections.abc import Set
from typing import Any

from megarlhf.cluster.group import WorkerGroup
from megarlhf.formats.shared_memory import Block, checksum


def weight_sync(actor: WorkerGroup, rollout: WorkerGroup, *, nodes: Set[int]) -> "SharedMemorySync":
    """The transport for where the roles are; nothing else knows which there are.

    Args:
        nodes: of all the actor's ranks and the engines.
    Raises:
        ValueError: more than one node, between which there is no transport.
    """
    if len(nodes) > 1:
        raise ValueError(
            f"the actor's ranks and the engines are on nodes {sorted(nodes)} (new weights reach vLLM through the "
            "memory of one host): set actor_num_nodes=1"
        )
    return SharedMemorySync(actor, rollout)


class SharedMemorySync:
    """Weights are read where the actor's ranks hold them: in shared memory, from the first sync on."""

    def __init__(self, actor: WorkerGroup, rollout: WorkerGroup) -> None:
        self.actor, self.rollout = actor, rollout
        self._num_bytes = 0
        self._blocks: list[Block] = []
        self._sent = 0, ""  # version and checksum of the last push

    def push(self, version: int) -> dict[str, float]:
        """See WeightSyncRole.

        Raises:
            RuntimeError: an engine reports another version or checksum than was sent.
        """
        if not self._num_bytes:
            self._blocks = [block for part in self.actor.call("share_weights") for block in part]
            self.rollout.call("connect_weights", self._blocks)
            self._num_bytes = sum(block.num_bytes for block in self._blocks)
        sent = checksum(digest for part in self.actor.call("refresh_shared_weights") for digest in part)
        self._sent = version, sent
        for engine, reply in enumerate(self.rollout.call("update_weights", version, sent)):
            self._check(engine, reply)
        return {"sync/version": float(version), "sync/bytes": float(self._num_bytes)}

    def restore(self, engine: int) -> None:
        """Give an engine that has just started the weights of the last push, which the actor has not changed since.

        Raises:
            RuntimeError: it reports others.
        """
        for method, arguments in (("connect_weights", (self._blocks,)), ("update_weights", self._sent)):
            call = self.rollout.submit_to(engine, method, *arguments)
            (reply,) = self.rollout.wait_for([call], method, ranks=[engine])
        self._check(engine, reply)

    def _check(self, engine: int, reply: dict[str, Any]) -> None:
        if (reply["version"], reply["checksum"]) != self._sent:
            version, sent = self._sent
            raise RuntimeError(
                f"rollout engine {engine} holds weights version {reply['version']} with checksum "
                f"{reply['checksum']}; version {version} with {sent} was sent"
            )
