"""How the actor's weights reach the inference engines: WeightSyncRole over groups of worker processes."""

from collections.abc import Set

from megarlhf.cluster.group import WorkerGroup
from megarlhf.formats.shared_memory import checksum
from megarlhf.trainers.roles import WeightSyncRole


def weight_sync(actor: WorkerGroup, rollout: WorkerGroup, *, nodes: Set[int]) -> WeightSyncRole:
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

    def push(self, version: int) -> dict[str, float]:
        """See WeightSyncRole.

        Raises:
            RuntimeError: an engine reports another version or checksum than was sent.
        """
        if not self._num_bytes:
            blocks = [block for part in self.actor.call("share_weights") for block in part]
            self.rollout.call("connect_weights", blocks)
            self._num_bytes = sum(block.num_bytes for block in blocks)
        sent = checksum(digest for part in self.actor.call("refresh_shared_weights") for digest in part)
        for engine, reply in enumerate(self.rollout.call("update_weights", version, sent)):
            if (reply["version"], reply["checksum"]) != (version, sent):
                raise RuntimeError(
                    f"rollout engine {engine} holds weights version {reply['version']} with checksum "
                    f"{reply['checksum']}; version {version} with {sent} was sent"
                )
        return {"sync/version": float(version), "sync/bytes": float(self._num_bytes)}
