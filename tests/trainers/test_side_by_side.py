"""Roles on devices of their own: at the same time, with the results of one after the other, and no thread left."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarlhf.data.types import Floats, Rollout, Sample, TrainingRows
from megarlhf.engine.objective import NonFiniteError
from megarlhf.trainers.roles import RoleFailedError
from megarlhf.trainers.side_by_side import side_by_side
from tests.trainers.plain_roles import PlainRoles
from tests.trainers.test_rl import run

SECONDS = 30  # that a test waits for a thread which does not come


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Together(PlainRoles):
    """Passes, scores and updates, of which none ends before those beside it have begun."""

    def __init__(self, *, without_result: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__(without_result=without_result)
        self.side_by_side = True
        self._scoring, self._updating = threading.Barrier(3), threading.Barrier(2)
        self.met: list[str] = []

    def score(self, rollout: Rollout) -> list[Sample]:
        if self.phase == "reward":
            self._scoring.wait(SECONDS)
            self.met.append("score")
        return super().score(rollout)

    def forward(self, rows: TrainingRows, shift: float) -> Floats:
        first = len(rows) == 8 and not {"advantages", "returns"} & rows.fields.keys()
        if first and shift in (0.0, 1.25):  # log-probs and values of all; the reference's come behind
            self._scoring.wait(SECONDS)
            self.met.append("values" if shift else "log_probs")
        return super().forward(rows, shift)

    def before_update(self, name: str) -> None:
        self._updating.wait(SECONDS)
        self.met.append(name)


def numbers(plain: PlainRoles, role: str) -> list[tuple[Any, ...]]:
    """Every update of a role, to the bit."""
    return [
        (
            rows.input_ids.tobytes(),
            rows.lengths.tobytes(),
            {name: np.asarray(field).tobytes() for name, field in rows.fields.items()},
            {name: np.asarray(field).tobytes() for name, field in rows.scalars.items()},
            denominator,
        )
        for name, rows, denominator in plain.updates
        if name == role
    ]


@pytest.mark.parametrize("lost", [(), ((1, 0),)])
def test_what_is_computed_at_once_is_what_is_computed_in_turn(tmp_path: Path, lost: Sequence[tuple[int, int]]) -> None:
    plain, together = PlainRoles(without_result=lost), Together(without_result=lost)
    algorithm = {"advantage_estimator": "gae"}
    rows = run(tmp_path / "plain", plain, algorithm=algorithm)
    found = run(tmp_path / "together", together, algorithm=algorithm)
    for role in ("actor", "critic"):
        assert numbers(together, role) == numbers(plain, role) != []
    moving = ("time/", "perf/")
    kept = [{key: value for key, value in row.items() if not key.startswith(moving)} for row in rows]
    assert [{k: v for k, v in row.items() if not k.startswith(moving)} for row in found] == kept
    assert together.saved == plain.saved
    assert sorted(together.met[:3]) == ["log_probs", "score", "values"], "these met each other"
    assert together.met.count("actor") == together.met.count("critic") == len(numbers(plain, "actor"))
    of_all, of_rest = 8, 8 - len(lost)
    once = [("actor", of_all), ("critic", of_all)]
    again = [("actor", of_rest), ("critic", of_rest)] if lost else []
    assert sorted(together.begun) == sorted([*once, *again] * 3), "again without what has no reward"


def test_roles_that_share_devices_take_turns() -> None:
    said: list[str] = []
    roles = PlainRoles().roles(critic=True)
    with side_by_side([lambda: said.append("a"), lambda: said.append("b")], roles) as wait:
        said.append("block")
        wait()
        said.append("end")
    assert said == ["block", "a", "b", "end"]


def lost_role() -> None:
    raise RoleFailedError("critic rank 0 died", trains=True)


def refused() -> None:
    raise NonFiniteError("actor: loss=nan")


@pytest.mark.parametrize(
    ("calls", "block", "raised"),
    [
        ([refused], None, NonFiniteError),
        ([refused, lost_role], None, RoleFailedError),
        ([lost_role], RuntimeError("the reward is gone"), RoleFailedError),
        ([], RuntimeError("the reward is gone"), RuntimeError),
    ],
)
def test_a_failure_waits_for_the_others_and_lost_weights_come_first(
    calls: list[Any], block: Exception | None, raised: type[Exception]
) -> None:
    plain, failed, done = PlainRoles(), threading.Event(), list[str]()
    plain.side_by_side = True

    def slow() -> None:
        assert failed.wait(SECONDS)
        done.append("slow")

    def failing() -> None:
        try:
            for call in calls[:1]:
                call()
        finally:
            failed.set()

    with pytest.raises(raised), side_by_side([failing, slow, *calls[1:]], plain.roles(critic=True)) as wait:
        if block is not None:
            raise block
        wait()
    assert done == ["slow"] and plain.stopped == []


def test_an_interruption_ends_the_processes_that_a_thread_waits_for() -> None:
    ended, plain = threading.Event(), PlainRoles()
    plain.side_by_side, plain.stopped = True, Ending(ended)

    def computes() -> None:
        assert ended.wait(SECONDS), "its processes were ended"
        raise RoleFailedError("actor rank 0 died", trains=True)

    with pytest.raises(KeyboardInterrupt), side_by_side([computes], plain.roles(critic=True)):
        raise KeyboardInterrupt
    assert plain.stopped == ["actor", "critic"]


def test_an_interruption_while_others_are_waited_for_after_a_failure() -> None:
    ended, failed, plain = threading.Event(), threading.Event(), PlainRoles()
    plain.side_by_side, plain.stopped = True, Ending(ended)

    def computes() -> None:
        assert failed.wait(SECONDS)
        time.sleep(0.2)  # until the main thread waits
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert ended.wait(SECONDS), "its processes were ended"

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), side_by_side([computes], plain.roles(critic=True)):
            failed.set()
            raise RuntimeError("the reward is gone")
    finally:
        signal.signal(signal.SIGINT, before)
    assert plain.stopped == ["actor", "critic"]


class Ending(list[str]):
    """Roles that were ended."""

    def __init__(self, ended: threading.Event) -> None:
        self._ended = ended

    def append(self, name: str) -> None:
        super().append(name)
        self._ended.set()
