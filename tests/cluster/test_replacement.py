"""An inference engine that is lost while it generates: another one answers its prompts, with the same weights."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarlhf.cluster import replacement
from megarlhf.cluster.group import WorkerFailedError
from megarlhf.cluster.local_processes import LocalProcesses
from megarlhf.cluster.processes import Processes
from megarlhf.cluster.replacement import EngineReplacement
from megarlhf.cluster.roles import RolloutGroup
from megarlhf.cluster.weight_sync import SharedMemorySync
from megarlhf.data.types import Prompt
from tests.cluster.answering_worker import ActorWorker, AnsweringWorker, ReadingWorker, StoringWorker
from tests.cluster.child_groups import group_of, processes_of


@pytest.fixture(scope="module", params=["children", pytest.param("ray", marks=pytest.mark.slow)])
def either(request: pytest.FixtureRequest) -> Iterator[Processes]:
    with processes_of(request.param) as found:
        yield found


def rollout_of(
    processes: Processes, directory: Path, *, most: int, limit: float = 60.0, worker: Any = AnsweringWorker
) -> RolloutGroup:
    """Two engines with weights of version 5."""
    engines = group_of(processes, "rollout", worker, directory, 2)
    sync = SharedMemorySync(group_of(processes, "actor", ActorWorker, directory, 1), engines)
    sync.push(4)
    sync.push(5)
    engines.timeout_seconds = limit
    replace = EngineReplacement(engines, sync.restore, most=most, start_timeout_seconds=60.0)
    return RolloutGroup(engines, n_samples_per_prompt=2, at_once=2, replace=replace)


PROMPTS = [Prompt(index=n, text="p", token_ids=np.arange(n + 1, dtype=np.int32), label=None) for n in range(5)]


@pytest.mark.parametrize("fault", ["die", "raise", "hang"])
def test_another_engine_gives_the_samples_of_one_that_is_lost(
    processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    rollout = rollout_of(processes, tmp_path, most=1, limit=3.0 if fault == "hang" else 60.0)
    expected = rollout.generate(PROMPTS, step=7, first_place=3)
    assert {sample.weight_version for sample in expected.samples} == {5}
    (tmp_path / "rollout-1.fault").write_text(fault)
    found = rollout.generate(PROMPTS, step=7, first_place=3)
    assert found.samples == expected.samples and found.tokens == expected.tokens
    said = capsys.readouterr().err
    first = {
        "die": "rollout rank 1 died during generate: the process has ended, exit status 3\n",
        "raise": "rollout rank 1 failed in generate: ValueError: no such prompt\n",
        "hang": "rollout ranks [1] did not finish generate within 3 s\n",
    }[fault]
    assert said == first + "another engine is started, which answers its prompts; max_restarts leaves 0 more\n"
    assert rollout.generate(PROMPTS, step=7, first_place=3).samples == expected.samples


def test_engines_are_replaced_as_often_as_may_be(processes: Processes, tmp_path: Path) -> None:
    rollout = rollout_of(processes, tmp_path, most=2)
    for rank in (0, 1):
        (tmp_path / f"rollout-{rank}.fault").write_text("die")
    assert len(rollout.generate(PROMPTS, step=1).samples) == 10
    (tmp_path / "rollout-0.fault").write_text("die")
    with pytest.raises(WorkerFailedError, match="rollout rank 0 died during generate"):
        rollout.generate(PROMPTS, step=2)


def test_no_engine_is_started_on_a_node_that_has_gone(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = rollout_of(processes, tmp_path, most=2)
    monkeypatch.setattr(processes, "has_lost", lambda node: node == 0)
    (tmp_path / "rollout-0.fault").write_text("die")
    monkeypatch.setattr(processes, "start", lambda *_: pytest.fail("started"))
    with pytest.raises(WorkerFailedError, match="rollout rank 0 died during generate"):
        rollout.generate(PROMPTS, step=1)


def test_a_node_that_is_known_to_have_gone_while_an_engine_starts_there(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout, answers = rollout_of(processes, tmp_path, most=2), iter([False, False])
    monkeypatch.setattr(replacement, "_POLL_SECONDS", 0.1)
    monkeypatch.setattr(processes, "has_lost", lambda node: next(answers, True))
    (tmp_path / "rollout-1.fault").write_text("die")
    (tmp_path / "rollout-1.late").touch()
    with pytest.raises(WorkerFailedError, match="rollout rank 1 died during generate"):
        rollout.generate(PROMPTS, step=1)
    assert next(answers, "asked") == "asked"


def test_what_a_lost_engine_answered_before_is_answered_again(
    either: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies in its second piece; Ray's store has lost the first one's tokens then."""
    rollout = rollout_of(either, tmp_path, most=1, worker=StoringWorker)
    expected = rollout.generate(PROMPTS, step=7)
    for path in tmp_path.glob("*.answers"):
        path.unlink()
    held, replace = tmp_path / "rollout-0.fault", rollout._replace
    assert replace is not None

    def replace_and_go_on(engine: int, lost: WorkerFailedError) -> None:
        replace(engine, lost)
        held.unlink()

    monkeypatch.setattr(rollout, "_replace", replace_and_go_on)
    held.write_text("hold")
    (tmp_path / "rollout-1.fault").write_text("answer die")
    found = rollout.generate(PROMPTS, step=7)
    assert found.samples == expected.samples
    answered = [line.split() for rank in (0, 1) for line in (tmp_path / f"rollout-{rank}.answers").open()]
    lost, *_ = (process for process, place in answered if place == "1")
    assert [process for process, _ in answered].count(lost) == 1 and len(answered) == len(PROMPTS) + 1
    (read,) = group_of(either, "actor", ReadingWorker, tmp_path, 1).call("begin", list(found.tokens))
    assert [place for place, _ in read] == [0, 1, 2, 3, 4]
    assert int(lost) not in {process for _, process in read}


def test_who_reads_what_has_gone_with_a_dead_process_has_lost_no_weights(either: Processes, tmp_path: Path) -> None:
    engines = group_of(either, "rollout", StoringWorker, tmp_path, 2)
    readers = group_of(either, "actor", ReadingWorker, tmp_path, 2)
    prompts = ([[1]], [0], 1, 1, None)
    given = [[tokens for _, tokens in answer] for answer in engines.call("generate", *prompts)]
    (tmp_path / "rollout-1.fault").write_text("die")
    with pytest.raises(WorkerFailedError, match="rollout rank 1 died during generate"):
        engines.call("generate", *prompts)

    def read(*engine_of: int) -> None:
        stored = readers.put([given[engine] for engine in engine_of])
        found = readers.wait_for([readers.submit_to(rank, "begin", own) for rank, own in enumerate(stored)], "begin")
        assert [[place for place, _ in tokens] for tokens in found] == [[0], [0]]

    if isinstance(either, LocalProcesses):
        read(0, 1)
        return
    deadline = time.monotonic() + 20
    said = r"^actor rank 1 failed in begin: values are lost with the process that stored them$"
    with pytest.raises(WorkerFailedError, match=said) as failed:
        while time.monotonic() < deadline:  # Ray frees what a dead process owned once a second
            read(0, 1)
    assert not failed.value.trains
    read(0, 0)
