"""Calls of worker groups that fail: the first failure at once, with role and rank; a death before what it causes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarlhf.cluster import group as group_module
from megarlhf.cluster.group import WorkerFailedError, WorkerGroup, wait_for_each
from megarlhf.cluster.processes import CallFailedError, ProcessDiedError, ProcessError, ValueLostError
from megarlhf.config.roles import ROLES
from megarlhf.engine.objective import NonFiniteError
from megarlhf.formats.run_checkpoints import SaveFailedError

Fault = BaseException | None
NEVER = 1e9


class FakeProcesses:
    """Calls as (seconds until it has ended, value or error) under a clock that `wait` moves."""

    device_names: Mapping[tuple[int, int], str] = {}
    addresses: Mapping[int, str] = {}

    def __init__(self) -> None:
        self.now = 0.0
        self.answers: dict[Any, tuple[float, Any]] = {}
        self.store: Any = self
        self.stored: list[Any] = []
        self.submitted: list[tuple[int, str, tuple[Any, ...]]] = []

    def ref(self, rank: int, after: float, answer: Any) -> str:
        self.answers[f"ref {rank}"] = (after, answer)
        return f"ref {rank}"

    def wait(self, calls: Sequence[Any], *, all_of_them: bool, timeout_seconds: float) -> tuple[list[Any], list[Any]]:
        wanted = sorted((self.answers[ref][0], i) for i, ref in enumerate(calls))[: None if all_of_them else 1]
        end = self.now + timeout_seconds
        ready = [i for after, i in wanted if after <= end]
        whole = len(ready) == len(wanted)
        self.now = max(self.now, max((self.answers[calls[i]][0] for i in ready), default=0.0)) if whole else end
        return [calls[i] for i in ready], [ref for i, ref in enumerate(calls) if i not in ready]

    def result(self, call: Any) -> Any:
        answer = self.answers[call][1]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def has_lost(self, node: int) -> bool:
        return node == 1

    def start(self, worker: Any, spec: Any, environment: Mapping[str, str]) -> Any: ...

    def kill(self, handle: int) -> None: ...

    def collect_logs(self) -> None: ...

    def submit(self, handle: int, method: str, *args: Any) -> None:
        self.submitted.append((handle, method, args))

    def put(self, values: Sequence[Any]) -> list[str]:
        self.stored += values
        return [f"stored {len(self.stored)}"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeProcesses:
    fake = FakeProcesses()
    monkeypatch.setattr(group_module, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def make_group(fake: FakeProcesses, tmp_path: Path, *, role: str = "actor", ranks: int = 3) -> WorkerGroup:
    """Two ranks on a node, in their order."""
    logs = [str(tmp_path / f"{role}-{rank}.log") for rank in range(ranks)]
    specs = [SimpleNamespace(node=rank // 2, log_file=log) for rank, log in enumerate(logs)]
    return WorkerGroup(ROLES[role], fake, list(range(ranks)), specs, launch=str, timeout_seconds=60.0)


def failed(error: Exception) -> Exception:
    """As what a worker raised comes to the group."""
    return CallFailedError(error)


def died() -> Exception:
    return ProcessDiedError("the process has ended, by SIGKILL")


def test_results_come_in_rank_order_whoever_is_first(fake: FakeProcesses, tmp_path: Path) -> None:
    refs = [fake.ref(0, 9.0, "a"), fake.ref(1, 1.0, "b"), fake.ref(2, 5.0, "c")]
    assert make_group(fake, tmp_path).wait_for(refs, "update") == ["a", "b", "c"]
    assert fake.now == 9.0


@pytest.mark.parametrize(("own", "limit"), [(None, 60.0), (7.0, 7.0)])
def test_a_call_past_its_limit_names_role_and_ranks(
    fake: FakeProcesses, tmp_path: Path, own: float | None, limit: float
) -> None:
    (tmp_path / "critic-1.log").write_text("".join(f"line {i}\n" for i in range(40)))
    refs = [fake.ref(0, 2.0, "done"), fake.ref(1, NEVER, "x"), fake.ref(2, NEVER, "x")]
    with pytest.raises(WorkerFailedError) as error:
        make_group(fake, tmp_path, role="critic").wait_for(refs, "values", timeout_seconds=own)
    said = str(error.value)
    assert said.startswith(f"critic ranks [1, 2] did not finish values within {limit:g} s")
    assert "line 39" in said and "line 24\n" not in said, "the first one's last words"
    assert fake.now == limit, "the limit is for all ranks together, not for each"
    assert error.value.trains


def test_where_a_rank_was_that_died(fake: FakeProcesses, tmp_path: Path) -> None:
    fake.addresses = {0: "10.0.0.5", 1: "10.0.0.6"}
    refs = [fake.ref(0, NEVER, "x"), fake.ref(1, NEVER, "x"), fake.ref(2, 1.0, died())]
    with pytest.raises(WorkerFailedError, match="actor rank 2 on node 10.0.0.6 died during update: "):
        make_group(fake, tmp_path).wait_for(refs, "update")


def test_many_slow_ranks_share_one_limit(fake: FakeProcesses, tmp_path: Path) -> None:
    refs = [fake.ref(rank, 25.0 * (rank + 1), "x") for rank in range(3)]
    with pytest.raises(WorkerFailedError, match=r"actor ranks \[2\] did not finish update within 60 s"):
        make_group(fake, tmp_path).wait_for(refs, "update")
    assert fake.now == 60.0


def test_the_first_failure_is_told_at_once(fake: FakeProcesses, tmp_path: Path) -> None:
    refs = [fake.ref(0, NEVER, "waits for rank 2"), fake.ref(1, 1.0, "done"), fake.ref(2, 3.0, failed(KeyError("w")))]
    with pytest.raises(WorkerFailedError, match=r"actor rank 2 failed in update: KeyError: 'w'"):
        make_group(fake, tmp_path).wait_for(refs, "update")
    assert fake.now == 3.0 + group_module._DEATH_SECONDS, "and not after the limit"


def test_a_dead_rank_is_named_before_those_that_only_notice(fake: FakeProcesses, tmp_path: Path) -> None:
    (tmp_path / "actor-2.log").write_text("Segmentation fault\n")
    noticed = failed(RuntimeError("connection closed by peer"))
    refs = [fake.ref(0, 1.0, noticed), fake.ref(1, 1.5, noticed), fake.ref(2, 2.0, died())]
    with pytest.raises(WorkerFailedError, match=r"actor rank 2 died during update(.|\n)*Segmentation fault"):
        make_group(fake, tmp_path).wait_for(refs, "update")


def test_an_engine_holds_no_weights_that_are_trained(fake: FakeProcesses, tmp_path: Path) -> None:
    with pytest.raises(WorkerFailedError, match="rollout rank 0 died during generate") as error:
        make_group(fake, tmp_path, role="rollout", ranks=1).wait_for([fake.ref(0, 1.0, died())], "generate")
    assert not error.value.trains


@pytest.mark.parametrize("error", [NonFiniteError("loss=nan"), SaveFailedError("rank 1: no room")])
def test_what_all_ranks_agree_on_is_no_failure_of_a_worker(
    fake: FakeProcesses, tmp_path: Path, error: Exception
) -> None:
    refs = [fake.ref(rank, 1.0, failed(error)) for rank in range(3)]
    with pytest.raises(type(error), match=f"actor: {error}"):
        make_group(fake, tmp_path).wait_for(refs, "update")


def test_other_errors_name_the_rank(fake: FakeProcesses, tmp_path: Path) -> None:
    refs = [fake.ref(0, NEVER, "x"), fake.ref(1, 1.0, ProcessError("object lost"))]
    with pytest.raises(WorkerFailedError, match="actor rank 1: save: object lost"):
        make_group(fake, tmp_path, ranks=2).wait_for(refs, "save")


def test_a_rank_whose_values_are_lost_holds_its_weights(fake: FakeProcesses, tmp_path: Path) -> None:
    group, missing = make_group(fake, tmp_path), ValueLostError("values are lost")
    refs = [fake.ref(0, 3.0, "done"), fake.ref(1, 1.0, missing), fake.ref(2, 2.0, missing)]
    for wait in (
        lambda: group.wait_for(refs, "begin"),
        lambda: wait_for_each([(group, "begin", dict(enumerate(refs)))], noticing=KeyError),
    ):
        with pytest.raises(WorkerFailedError, match="^actor rank 1 failed in begin: values are lost$") as error:
            wait()
        assert not error.value.trains
    fake.ref(0, 3.0, died())
    with pytest.raises(WorkerFailedError, match="actor rank 0 died during begin") as error:
        group.wait_for(refs, "begin")
    assert error.value.trains


def test_a_call_goes_to_every_rank_and_stores_what_is_large_once(fake: FakeProcesses, tmp_path: Path) -> None:
    make_group(fake, tmp_path, ranks=2).submit("update", [1, 2], 7.0, {"a": 1})
    assert fake.stored == [[1, 2], {"a": 1}]
    assert fake.submitted == [(rank, "update", ("stored 1", 7.0, "stored 2")) for rank in (0, 1)]


def test_calls_that_compute_are_timed_by_rank_or_by_what_their_answer_says(fake: FakeProcesses, tmp_path: Path) -> None:
    group = make_group(fake, tmp_path)
    for what, answers in (
        ("log_probs", [None, None, None]),
        ("ref_log_probs", [None, None, None]),
        ("update", [SimpleNamespace(seconds=own) for own in (0.5, 0.25, 2.0)]),
        ("save", [None, None, None]),  # which computes nothing
    ):
        refs = [fake.ref(rank, fake.now + after, answers[rank]) for rank, after in enumerate((9.0, 1.0, 5.0))]
        group.wait_for(refs, what)
    spent = group.seconds.take()
    assert spent == {
        "experience": {0: (18.0, 0), 1: (2.0, 0), 2: (10.0, 0)},
        "train": {0: (0.5, 0), 1: (0.25, 0), 2: (2.0, 0)},
    }
    assert group.seconds.take() == {}


def test_of_many_calls_the_first_that_ends_or_is_late(fake: FakeProcesses, tmp_path: Path) -> None:
    group = make_group(fake, tmp_path, role="rollout", ranks=2)
    slow, fast = fake.ref(0, 40.0, "slow"), fake.ref(1, 2.0, "fast")
    assert group.first_of({slow: 0.0, fast: 0.0}) == fast and fake.now == 2.0
    hangs = fake.ref(1, NEVER, "x")
    assert group.first_of({hangs: 2.0, slow: 0.0}) == slow and fake.now == 40.0
    assert group.first_of({hangs: 2.0}) == hangs and fake.now == 62.0, "60 s after it was asked"
    with pytest.raises(WorkerFailedError, match=r"rollout ranks \[1\] did not finish generate within 60 s"):
        group.wait_for([hangs], "generate", ranks=[1], since=2.0)
    assert fake.now == 62.0
