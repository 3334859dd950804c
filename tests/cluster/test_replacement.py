"""An inference engine that is lost while it generates: another one answers its prompts, with the same weights."""

from pathlib import Path

import numpy as np
import pytest

from megarlhf.cluster import replacement
from megarlhf.cluster.group import WorkerFailedError
from megarlhf.cluster.processes import Processes
from megarlhf.cluster.replacement import EngineReplacement
from megarlhf.cluster.roles import RolloutGroup
from megarlhf.cluster.weight_sync import SharedMemorySync
from megarlhf.data.types import Prompt
from tests.cluster.answering_worker import ActorWorker, AnsweringWorker
from tests.cluster.child_groups import group_of


def rollout_of(processes: Processes, directory: Path, *, most: int, limit: float = 60.0) -> RolloutGroup:
    """Two engines with weights of version 5."""
    engines = group_of(processes, "rollout", AnsweringWorker, directory, 2)
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
