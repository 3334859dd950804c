"""The choice of a transport."""

from typing import Any

import pytest

from megarlhf.cluster.weight_sync import SharedMemorySync, weight_sync
from tests.cluster.recorded_groups import RecordedGroup


def groups() -> tuple[Any, Any]:
    return RecordedGroup("actor", []), RecordedGroup("rollout", [])


def test_on_one_node_weights_are_read_from_shared_memory() -> None:
    actor, rollout = groups()
    sync = weight_sync(actor, rollout, nodes={3})
    assert isinstance(sync, SharedMemorySync) and (sync.actor, sync.rollout) == (actor, rollout)


def test_between_nodes_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"on nodes \[0, 2\] .* one host\): set actor_num_nodes=1"):
        weight_sync(*groups(), nodes={2, 0})
