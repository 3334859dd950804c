"""Worker processes, of Ray and without: calls, failures, deaths, values in shared memory; and that nothing is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np
import psutil
import pytest

from megarlhf.cluster import group as group_module
from megarlhf.cluster import local_processes as local_processes_module
from megarlhf.cluster.group import WorkerFailedError, WorkerGroup
from megarlhf.cluster.local_processes import LocalProcesses, local_processes
from megarlhf.cluster.local_store import LocalStore
from megarlhf.cluster.processes import CallFailedError, ProcessDiedError, ProcessError, Processes
from megarlhf.cluster.reward import RewardGroup
from megarlhf.config.roles import ROLES
from megarlhf.data.planning import PackingOptions
from tests.cluster.asked_worker import AskedWorker, num_memories
from tests.cluster.child_groups import Spec, processes_of
from tests.cluster.plain_workers import make_rollout


@pytest.fixture(scope="module", params=["children", pytest.param("ray", marks=pytest.mark.slow)])
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    with processes_of(request.param) as found:
        yield found


@pytest.fixture
def children() -> Iterator[LocalProcesses]:
    with local_processes() as found:
        assert isinstance(found, LocalProcesses)
        yield found


def spec_of(rank: int, log_file: str = "none") -> Any:
    return Spec(f"actor-{rank}", log_file)


def begin(processes: Processes, rank: int, environment: Mapping[str, str] | None = None) -> Any:
    return processes.start(AskedWorker, spec_of(rank), environment or {})


def ask(processes: Processes, handle: Any, method: str, *args: Any) -> Any:
    call = processes.submit(handle, method, *args)
    ended, others = processes.wait([call], all_of_them=True, timeout_seconds=60)
    assert ended == [call] and not others, "no answer in a minute"
    return processes.result(call)


@pytest.fixture(scope="module")
def pair(processes: Processes) -> list[Any]:
    """Two workers that live through the tests of this file."""
    return [begin(processes, rank, {"OMP_NUM_THREADS": f"{rank + 3}", "GIVEN": f"of {rank}"}) for rank in range(2)]


def test_each_has_its_environment_from_its_first_instruction_on(processes: Processes, pair: list[Any]) -> None:
    for rank, handle in enumerate(pair):
        assert ask(processes, handle, "name") == f"actor-{rank}"
        if isinstance(processes, LocalProcesses):  # Ray sets it after the start
            assert ask(processes, handle, "environment", "OMP_NUM_THREADS") == f"{rank + 3}"
            assert ask(processes, handle, "environment", "GIVEN") == f"of {rank}"
    assert len({os.getpid(), *(ask(processes, handle, "process") for handle in pair)}) == 3


def test_calls_run_side_by_side_and_whoever_is_ready_comes_first(processes: Processes, pair: list[Any]) -> None:
    for handle in pair:
        ask(processes, handle, "name")  # both are up
    slow, quick = (processes.submit(handle, "sleep", s) for handle, s in zip(pair, (1.0, 0.1), strict=True))
    ended, others = processes.wait([slow, quick], all_of_them=False, timeout_seconds=20)
    assert (ended, others) == ([quick], [slow]) and processes.result(quick) == 0.1
    started = time.monotonic()
    assert processes.wait(others, all_of_them=False, timeout_seconds=0.2) == ([], [slow]), "time is up"
    assert time.monotonic() - started < 1.0
    assert processes.wait([slow, quick], all_of_them=True, timeout_seconds=20) == ([slow, quick], [])


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [("key", KeyError, "'w'"), ("two", Exception, "a and b"), ("unsent", Exception, "holds a")],
)
def test_what_a_call_raises_comes_back_and_the_process_goes_on(
    processes: Processes, pair: list[Any], kind: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(ProcessError, match=said) as raised:
        ask(processes, pair[0], "fail", kind)
    if kind != "two" or isinstance(processes, LocalProcesses):  # what Ray cannot read again is no task's error to it
        assert isinstance(raised.value, CallFailedError) and isinstance(raised.value.cause, error)
    assert ask(processes, pair[0], "name") == "actor-0"


def test_values_go_by_reference_inside_arguments_results_and_each_other(
    processes: Processes, pair: list[Any]
) -> None:
    numbers = np.arange(50_000, dtype=np.float32).reshape(100, 500)
    shapes = [numbers, numbers.T, numbers[:, ::2], np.empty((0, 3), dtype=np.int32), np.array(7.5)]
    for array, stored in zip(shapes, processes.store.put(shapes), strict=True):
        [same] = processes.store.get([stored])
        np.testing.assert_array_equal(same, array)
        total, shape, dtype, writeable, owns = ask(processes, pair[1], "facts", stored)
        assert (total, shape, dtype) == (array.sum(), array.shape, array.dtype.str)
        assert array.ndim == 0 or not array.flags.forc or not (owns or writeable or same.flags.writeable)
    made = ask(processes, pair[0], "put", 3)
    assert [number for number, _ in made] == [0, 1, 2]
    ask(processes, pair[0], "name")  # it has let go, and its values are there
    for number, value in zip(range(3), processes.store.get([stored for _, stored in made]), strict=True):
        assert value.tolist() == [number] * 1000
    [given] = processes.store.put([("a list of references", [stored for _, stored in made[1:]])])
    del made
    assert ask(processes, pair[1], "keep", given) == 3000.0
    del given
    assert ask(processes, pair[1], "kept") == 3000.0, "arrays outlive their references"
    ask(processes, pair[1], "forget")


@pytest.mark.parametrize("how", ["killed", "exits", "is not made"])
def test_a_death_is_told_at_once(processes: Processes, how: str) -> None:
    handle = begin(processes, 9 if how == "is not made" else 5)
    if how == "killed":
        process = ask(processes, handle, "process")
        call = processes.submit(handle, "sleep", 60.0)
        os.kill(process, signal.SIGKILL)
    else:
        call = processes.submit(handle, "exit", 3)
    started = time.monotonic()
    ended, _ = processes.wait([call], all_of_them=False, timeout_seconds=50)
    assert ended == [call] and (how != "killed" or time.monotonic() - started < 5)
    with pytest.raises(ProcessDiedError) as raised:
        processes.result(call)
    if isinstance(processes, LocalProcesses):
        status = {"killed": "by SIGKILL", "exits": "exit status 3", "is not made": "exit status 1"}[how]
        assert str(raised.value) == f"the process has ended, {status}"
    with pytest.raises(ProcessDiedError):
        ask(processes, handle, "name")


def test_a_kill_ends_the_process_and_its_call(processes: Processes) -> None:
    handle = begin(processes, 6)
    process = ask(processes, handle, "process")
    call = processes.submit(handle, "sleep", 60.0)
    processes.kill(handle)
    processes.wait([call], all_of_them=False, timeout_seconds=30)
    with pytest.raises(ProcessDiedError):
        processes.result(call)
    assert gone([process])


def test_a_group_tells_role_rank_and_last_words(
    children: LocalProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_module, "_DEATH_SECONDS", 0.5)  # rank 0 will not have answered
    specs = [spec_of(rank, str(tmp_path / f"{rank}.log")) for rank in range(2)]
    def launch(spec: Any) -> Any:
        return children.start(AskedWorker, spec, {})

    group = WorkerGroup(ROLES["critic"], children, list(map(launch, specs)), specs, launch=launch, timeout_seconds=30)
    assert group.call("name") == ["actor-0", "actor-1"]
    (tmp_path / "1.log").write_text("Segmentation fault\n")
    with pytest.raises(WorkerFailedError, match=r"critic rank 1 failed in fail: KeyError: 'w'\nlast lines of .*\n  S"):
        group.wait_for([group.submit_to(0, "name"), group.submit_to(1, "fail", "key")], "fail")
    with pytest.raises(WorkerFailedError, match=r"critic ranks \[0, 1\] did not finish sleep within 0.5 s"):
        group.call("sleep", 1.0, timeout_seconds=0.5)
    waiting = group.submit_to(0, "sleep", 60.0)
    words = r"rank 1 died during exit: the process has ended, exit status 7\nlast lines of .*\n  Segmentation fault"
    with pytest.raises(WorkerFailedError, match=words):
        group.wait_for([waiting, group.submit_to(1, "exit", 7)], "exit")


def gone(numbers: list[int]) -> bool:
    """Whether these processes end within some seconds; if not, they are ended."""
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(n) and psutil.Process(n).status() != psutil.STATUS_ZOMBIE for n in numbers):
        if time.monotonic() > deadline:
            for number in filter(psutil.pid_exists, numbers):
                os.kill(number, signal.SIGKILL)
            return False
        time.sleep(0.02)
    return True


def test_a_death_is_told_though_what_it_started_holds_the_connection(children: LocalProcesses) -> None:
    handle = begin(children, 0)
    process = ask(children, handle, "process")
    with pytest.raises(ProcessDiedError, match="exit status 4"):
        ask(children, handle, "fork_and_exit")
    left = [p.pid for p in psutil.process_iter() if os.getsid(p.pid) == process and p.pid != process]
    assert len(left) == 1
    children.close()
    assert gone(left)


def test_a_worker_that_hangs_up_and_lives_on_is_ended(
    children: LocalProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_processes_module, "_ENDING_SECONDS", 0.2)
    with pytest.raises(ProcessDiedError, match="by SIGKILL"):
        ask(children, begin(children, 0), "hang_up")


def test_an_answer_that_cannot_be_read_is_told_and_the_process_goes_on(children: LocalProcesses) -> None:
    handle = begin(children, 0)
    with pytest.raises(ProcessError, match="answer cannot be read: TypeError"):
        ask(children, handle, "unread")
    assert ask(children, handle, "name") == "actor-0"


def test_signals_to_the_whole_job_are_the_drivers_affair(children: LocalProcesses) -> None:
    handle = begin(children, 0)
    process = ask(children, handle, "process")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(process, number)
    assert ask(children, handle, "name") == "actor-0"


DRIVER = """
import os, signal, time
from tests.cluster.asked_worker import AskedWorker
from tests.cluster.test_processes import ask, begin
from megarlhf.cluster.local_processes import LocalProcesses
children = LocalProcesses()
handles = [begin(children, rank) for rank in range(3)]
numbers = [ask(children, handle, method) for method in ("process", "start_child") for handle in handles]
calls = [children.submit(handles[1], "sleep", 600.0), children.submit(handles[2], "compute", 600.0)]
time.sleep(0.2)  # they are at it
print(*numbers, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_outlives_a_driver_that_is_killed(tmp_path: Path) -> None:
    """Of three workers one waits for a call, one sleeps and one computes; each has started a process."""
    with (tmp_path / "said").open("w") as said:
        status = subprocess.run([sys.executable, "-c", DRIVER], stdout=said, timeout=120).returncode
    numbers = [int(word) for word in (tmp_path / "said").read_text().split()]
    assert status == -signal.SIGKILL and len(set(numbers)) == 6
    assert gone(numbers)


def test_arrays_are_read_where_they_lie_and_memory_goes_with_its_last_reader(children: LocalProcesses) -> None:
    before = num_memories(os.getpid())
    handle = begin(children, 0)
    assert ask(children, handle, "num_memories") == 0
    stored = children.store.put([np.full(1_000_000, 3), np.full(5, 4)])
    first, again, other = children.store.get([stored[0], stored[0], stored[1]])
    assert np.shares_memory(first, again) and not first.flags.owndata
    [given] = children.store.put([("words", [stored[0]])])
    assert ask(children, handle, "keep", given) == 3_000_000.0
    memory = stored[0].memory
    start, stop = stored[0].spans[1]
    with open(f"/proc/{os.getpid()}/fd/{memory.descriptor}", "r+b") as file:  # one memory, whoever reads it
        file.seek(start)
        file.write(np.full(1000, 5).tobytes())
    assert stop - start == first.nbytes and start % 64 == 0
    assert first[:1001].tolist() == [5] * 1000 + [3] and ask(children, handle, "kept") == 3_002_000.0
    del stored, first, again, memory
    assert other.tolist() == [4] * 5, "an array keeps what it lies in"
    del other
    [value] = children.store.get([given])
    assert children.store.get(value[1])[0][1000] == 3, "what is stored keeps what it refers to"
    del value, given
    assert num_memories(os.getpid()) == before
    ask(children, handle, "forget")
    assert ask(children, handle, "num_memories") == 0


def test_a_worker_holds_what_it_stored_until_the_driver_asks_on(children: LocalProcesses) -> None:
    before = num_memories(os.getpid())
    handle = begin(children, 0)
    made = ask(children, handle, "put", 3)
    assert num_memories(os.getpid()) == before + 1, "one memory for all of a call"
    assert ask(children, handle, "num_memories") == 0
    assert [value[0] for value in children.store.get([stored for _, stored in made])] == [0, 1, 2]
    del made
    assert num_memories(os.getpid()) == before


def test_references_of_many_values_take_one_descriptor() -> None:
    before = num_memories(os.getpid())
    stored = LocalStore().put([np.arange(number) for number in range(3000)])
    assert [len(value) for value in LocalStore().get(stored)] == list(range(3000))
    assert num_memories(os.getpid()) <= before + 3


def test_a_reward_model_is_stopped_while_it_computes_alone(children: LocalProcesses, tmp_path: Path) -> None:
    """Two models share devices: one computes, one waits for its turn, and both end; a third is asked for nothing."""
    turn, fails, groups = Lock(), list[str](), list[RewardGroup]()
    for rank in range(3):
        spec = spec_of(rank, str(tmp_path / "none"))
        workers = WorkerGroup(
            ROLES["reward"], children, [begin(children, rank)], [spec], launch=str, timeout_seconds=60.0
        )
        groups.append(RewardGroup(workers, [(0, PackingOptions(max_tokens=40, share_prefix=False))], turn=turn))

    def score(group: RewardGroup) -> None:
        with pytest.raises(WorkerFailedError, match="rank 0 died during scores") as failed:
            group.scores(make_rollout([[2, 3]]), eos=None)
        fails.append(str(failed.value))

    threads = [Thread(target=score, args=(group,)) for group in groups[:2]]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    while not (turn.locked() and all(group._is_asked for group in groups[:2])):
        assert time.monotonic() < start + 20
        time.sleep(0.01)
    for group in groups:
        group.stop()
    for thread in threads:
        thread.join(20)
    assert len(fails) == 2 and time.monotonic() - start < 15
    assert ask(children, groups[2].workers.handles[0], "name") == "actor-2"
