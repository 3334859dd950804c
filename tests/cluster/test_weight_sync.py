"""Weights that an actor's processes broadcast to engines' over real connections, and what becomes of lost ones."""

from pathlib import Path
from typing import Any

import pytest

from megarlhf.cluster.group import WorkerFailedError
from megarlhf.cluster.processes import Processes
from megarlhf.cluster.weight_sync import BucketSync, SharedMemorySync, weight_sync
from megarlhf.planner.transport import Transport
from tests.cluster.child_groups import group_of
from tests.cluster.recorded_groups import RecordedGroup
from tests.cluster.sending_workers import ROWS, ReceivingWorker, SendingWorker, weights
from tests.trainers.plain_roles import make_config


def sync_of(processes: Processes, directory: Path, *, timeout_seconds: float = 60.0, **options: bool) -> BucketSync:
    """Three ranks, of which two send, and two engines."""
    return BucketSync(
        group_of(processes, "actor", SendingWorker, directory, 3),
        group_of(processes, "rollout", ReceivingWorker, directory, 2),
        one_host=True,
        workers_per_engine=1,
        bucket_bytes=4096,
        timeout_seconds=timeout_seconds,
        **({"by_handle": False, "colocated": False} | options),
    )


def expected(version: int) -> list[float]:
    return list(map(float, weights(version, 2)[:, 0]))


@pytest.mark.parametrize("by_handle", [False, True])
def test_every_engine_has_every_version(processes: Processes, tmp_path: Path, by_handle: bool) -> None:
    sync = sync_of(processes, tmp_path, colocated=True, by_handle=by_handle)
    for version in (1, 2):
        sent = sync.push(version)
        assert sent == {"sync/version": version, "sync/bytes": 2 * ROWS * 1024}
        assert sync.rollout.call("found") == [expected(version)] * 2
    sync.actor.call("sleep", ("parameters",))
    sync.rollout.restart(1)
    assert sync.rollout.call("found") == [expected(2), None]
    sync.restore(1)
    assert sync.rollout.call("found") == [expected(2)] * 2
    with pytest.raises(WorkerFailedError, match="parameters are away"):  # as they were before
        sync.push(3)
    sync.actor.call("wake", ("parameters",))
    sync.push(4)
    assert sync.rollout.call("found") == [expected(4)] * 2


@pytest.mark.parametrize("by_handle", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("lost", "fault", "message"),
    [
        ("actor-1", "die", "actor rank 1 died during send_weights"),
        ("rollout-1", "die", "rollout rank 1 died during update_weights"),
        pytest.param("rollout-1", "raise", "rollout rank 1 failed in update_weights: KeyError", marks=pytest.mark.slow),
        pytest.param("actor-1", "raise", "actor rank 1 failed in send_weights: KeyError", marks=pytest.mark.slow),
        pytest.param("rollout-0", "hang", "rollout rank 0 did not finish update_weights, and", marks=pytest.mark.slow),
        pytest.param("actor-0", "hang", "actor rank 0 did not finish send_weights, and", marks=pytest.mark.slow),
    ],
)
def test_who_is_lost_is_named_and_no_engine_has_a_mixture(
    processes: Processes, tmp_path: Path, lost: str, fault: str, message: str, by_handle: bool
) -> None:
    """Hanging ones take the timeout of 15 s, and are slow."""
    sync = sync_of(processes, tmp_path, timeout_seconds=15.0 if fault == "hang" else 60.0, by_handle=by_handle)
    sync.push(1)
    (tmp_path / f"{lost}.fault").write_text(fault)
    with pytest.raises(WorkerFailedError, match=message) as caught:
        sync.push(2)
    assert caught.value.trains == lost.startswith("actor")
    left = [engine for engine in range(2) if fault == "raise" or lost != f"rollout-{engine}"]
    calls = [sync.rollout.submit_to(engine, "found") for engine in left]
    assert sync.rollout.wait_for(calls, "found", ranks=left) == [None] * len(left)
    if lost.startswith("rollout"):
        sync.rollout.restart(int(lost[-1]))
    if lost.startswith("rollout") or fault == "raise":
        sync.push(3)
        assert sync.rollout.call("found") == [expected(3)] * 2


def test_the_plan_chooses(tmp_path: Path) -> None:
    groups: Any = RecordedGroup("actor", []), RecordedGroup("rollout", [])
    config = make_config(tmp_path)
    shared = weight_sync(*groups, config, Transport(name="shared_memory", why="", one_host=True))
    assert isinstance(shared, SharedMemorySync) and (shared.actor, shared.rollout) == groups
    sent = weight_sync(*groups, config, Transport(name="broadcast", why="", one_host=False))
    assert isinstance(sent, BucketSync) and not sent._by_handle and (sent.actor, sent.rollout) == groups
    gathered = weight_sync(*groups, config, Transport(name="ipc", why="", one_host=True))
    assert isinstance(gathered, BucketSync) and gathered._by_handle
