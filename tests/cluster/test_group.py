"""Calls of worker groups that fail: the first failure at once, with role and rank; a death before what it causes."""

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from megarlhf.cluster import group as group_module
from megarlhf.cluster.group import WorkerFailedError, WorkerGroup
from megarlhf.config.roles import ROLES
from megarlhf.engine.objective import NonFiniteError

Fault = BaseException | None
NEVER = 1e9


class FakeRay:
    """References as (seconds until it is done, value or error) under a clock that ray.wait moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.answers: dict[Any, tuple[float, Any]] = {}

    def ref(self, rank: int, after: float, answer: Any) -> str:
        self.answers[f"ref {rank}"] = (after, answer)
        return f"ref {rank}"

    def wait(self, refs: Sequence[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        done = sorted((self.answers[ref][0], i) for i, ref in enumerate(refs))[:num_returns]
        end = self.now + timeout
        ready = [i for after, i in done if after <= end]
        whole = len(ready) == num_returns
        self.now = max(self.now, max((self.answers[refs[i]][0] for i in ready), default=0.0)) if whole else end
        return [refs[i] for i in ready], [ref for i, ref in enumerate(refs) if i not in ready]

    def get(self, ref: Any) -> Any:
        answer = self.answers[ref][1]
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    for name in ("wait", "get"):
        monkeypatch.setattr(ray, name, getattr(fake, name))
    monkeypatch.setattr(group_module, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def make_group(tmp_path: Path, *, role: str = "actor", ranks: int = 3) -> WorkerGroup:
    specs = [SimpleNamespace(log_file=str(tmp_path / f"{role}-{rank}.log")) for rank in range(ranks)]
    return WorkerGroup(ROLES[role], list(range(ranks)), specs, timeout_seconds=60.0)


def failed(error: Exception) -> Exception:
    """As Ray hands over what a worker raised."""
    return ray.exceptions.RayTaskError("update", "traceback", error)


def died() -> Exception:
    return ray.exceptions.ActorDiedError()


def test_results_come_in_rank_order_whoever_is_first(fake: FakeRay, tmp_path: Path) -> None:
    refs = [fake.ref(0, 9.0, "a"), fake.ref(1, 1.0, "b"), fake.ref(2, 5.0, "c")]
    assert make_group(tmp_path).wait_for(refs, "update") == ["a", "b", "c"]
    assert fake.now == 9.0


@pytest.mark.parametrize(("own", "limit"), [(None, 60.0), (7.0, 7.0)])
def test_a_call_past_its_limit_names_role_and_ranks(
    fake: FakeRay, tmp_path: Path, own: float | None, limit: float
) -> None:
    (tmp_path / "critic-1.log").write_text("".join(f"line {i}\n" for i in range(40)))
    refs = [fake.ref(0, 2.0, "done"), fake.ref(1, NEVER, "x"), fake.ref(2, NEVER, "x")]
    with pytest.raises(WorkerFailedError) as error:
        make_group(tmp_path, role="critic").wait_for(refs, "values", timeout_seconds=own)
    said = str(error.value)
    assert said.startswith(f"critic ranks [1, 2] did not finish values within {limit:g} s")
    assert "line 39" in said and "line 24\n" not in said, "the first one's last words"
    assert fake.now == limit, "the limit is for all ranks together, not for each"
    assert error.value.trains


def test_many_slow_ranks_share_one_limit(fake: FakeRay, tmp_path: Path) -> None:
    refs = [fake.ref(rank, 25.0 * (rank + 1), "x") for rank in range(3)]
    with pytest.raises(WorkerFailedError, match=r"actor ranks \[2\] did not finish update within 60 s"):
        make_group(tmp_path).wait_for(refs, "update")
    assert fake.now == 60.0


def test_the_first_failure_is_told_at_once(fake: FakeRay, tmp_path: Path) -> None:
    refs = [fake.ref(0, NEVER, "waits for rank 2"), fake.ref(1, 1.0, "done"), fake.ref(2, 3.0, failed(KeyError("w")))]
    with pytest.raises(WorkerFailedError, match=r"actor rank 2 failed in update: KeyError: 'w'"):
        make_group(tmp_path).wait_for(refs, "update")
    assert fake.now == 3.0 + group_module._DEATH_SECONDS, "and not after the limit"


def test_a_dead_rank_is_named_before_those_that_only_notice(fake: FakeRay, tmp_path: Path) -> None:
    (tmp_path / "actor-2.log").write_text("Segmentation fault\n")
    noticed = failed(RuntimeError("connection closed by peer"))
    refs = [fake.ref(0, 1.0, noticed), fake.ref(1, 1.5, noticed), fake.ref(2, 2.0, died())]
    with pytest.raises(WorkerFailedError, match=r"actor rank 2 died during update(.|\n)*Segmentation fault"):
        make_group(tmp_path).wait_for(refs, "update")


def test_an_engine_holds_no_weights_that_are_trained(fake: FakeRay, tmp_path: Path) -> None:
    with pytest.raises(WorkerFailedError, match="rollout rank 0 died during generate") as error:
        make_group(tmp_path, role="rollout", ranks=1).wait_for([fake.ref(0, 1.0, died())], "generate")
    assert not error.value.trains


def test_a_refused_step_is_no_failure_of_a_worker(fake: FakeRay, tmp_path: Path) -> None:
    refs = [fake.ref(rank, 1.0, failed(NonFiniteError("loss=nan"))) for rank in range(3)]
    with pytest.raises(NonFiniteError, match="actor: loss=nan"):
        make_group(tmp_path).wait_for(refs, "update")


def test_other_errors_of_ray_name_the_rank(fake: FakeRay, tmp_path: Path) -> None:
    refs = [fake.ref(0, NEVER, "x"), fake.ref(1, 1.0, ray.exceptions.ObjectLostError("ab" * 14, None, ""))]
    with pytest.raises(WorkerFailedError, match="actor rank 1: save: "):
        make_group(tmp_path, ranks=2).wait_for(refs, "save")


def test_a_call_goes_to_every_rank_and_stores_what_is_large_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored: list[Any] = []
    monkeypatch.setattr(ray, "put", lambda value: stored.append(value) or f"stored {len(stored)}")
    got: list[tuple[int, Any]] = []

    def handle(rank: int) -> Any:
        return SimpleNamespace(update=SimpleNamespace(remote=lambda *args: got.append((rank, args))))

    specs = [SimpleNamespace(log_file="none")] * 2
    group = WorkerGroup(ROLES["actor"], [handle(0), handle(1)], specs, timeout_seconds=time.monotonic())
    group.submit("update", [1, 2], 7.0, {"a": 1})
    assert stored == [[1, 2], {"a": 1}]
    assert got == [(rank, ("stored 1", 7.0, "stored 2")) for rank in (0, 1)]
