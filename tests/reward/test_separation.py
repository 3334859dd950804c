"""Reward code and the other processes of its user, in each of the ways in which it can be kept away from them.

Each test starts some Python processes, about 0.2 s each. What this system does not offer is skipped.
"""

import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megarlhf.reward.scorer import RewardScorer
from megarlhf.reward.separation import landlock_version
from tests.reward.samples import samples, scored_by

ROOT = Path(__file__).resolve().parents[2]
MARK = "named-by-nobody"
# A reward function for labels that are ids of processes: 1000 x processes in sight that are not its own + 100 x whether
# it reads that process's environment + 10 x the environments in sight with the mark + whether its own has the mark.
LOOK = f"""
import os
MARK = "{MARK}"
def readable(path):
    try:
        return open(path, "rb").read()
    except OSError:
        return b""
def reward_func(queries, prompts, labels):
    ours = {{os.getpid(), 1}}
    everyone = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    seen = sum(MARK.encode() in readable(f"/proc/{{process}}/environ") for process in everyone)
    return [
        1000 * len(set(everyone) - ours) + 100 * bool(readable(f"/proc/{{label}}/environ")) + 10 * seen
        + (MARK in os.environ.values())
        for label in labels
    ]
"""
# Prints what a process that APART has kept apart can do to another process of its user.
TRY = """
import ctypes, os, shutil, subprocess, sys, tempfile, time
from megarlhf.reward.separation import enter_landlock, separate
def attempt(name, function):
    try:
        function()
    except OSError as error:
        print(name, error.strerror)
    else:
        print(name, "ok")
if AS_NOBODY:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as a program that this user has started
other = subprocess.Popen(["/bin/sleep", "60"], stdout=subprocess.DEVNULL, env={"NAME": "VALUE"})
folder = tempfile.mkdtemp()
while not open(f"/proc/{other.pid}/environ").read():
    time.sleep(0.01)
sys.stdout.flush()
tester = os.fork()
if tester == 0:
    print(APART())
    for name in ("environ", "mem", "maps"):
        attempt(name, lambda: open(f"/proc/{other.pid}/{name}", "rb").close())
    print("cat", subprocess.run(["cat", f"/proc/{other.pid}/environ"], stderr=subprocess.DEVNULL).returncode)
    attempt("signal", lambda: os.kill(other.pid, 0))
    os.makedirs(folder + "/a"); os.makedirs(folder + "/b"); open(folder + "/a/file", "w").close()
    attempt("move", lambda: os.rename(folder + "/a/file", folder + "/b/file"))
    print("uid", os.getuid(), flush=True)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(tester, 0)[1]) == 7
other.kill()
shutil.rmtree(folder)
"""


# A reward function that is 10 x whether it reaches the port of its label at 127.0.0.1 + whether it can serve itself.
CONNECT = """
import socket
def reaches(port):
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
def reward_func(queries, prompts, labels):
    with socket.create_server(("127.0.0.1", 0)) as server:
        own = reaches(server.getsockname()[1])
    try:
        return [10 * reaches(label) + own for label in labels]
    except ConnectionRefusedError:
        return [0 + own for label in labels]
"""
# One that calls a service of another machine.
CALL = """
import socket
def reward_func(queries, prompts, labels):
    socket.create_connection(("192.0.2.77", 80), timeout=5)
"""


@pytest.fixture
def bystander() -> Iterator[int]:
    """Another process of this user, as the run's are."""
    with subprocess.Popen(["sleep", "60"], env={"NAME": MARK, "PATH": os.environ["PATH"]}) as process:
        while MARK.encode() not in Path(f"/proc/{process.pid}/environ").read_bytes():
            assert process.poll() is None  # it is there a moment after the process has started
        yield process.pid
        process.kill()


def run_python(text: str, *before: str) -> list[str]:
    """Lines that Python prints for a program."""
    command = [*before, sys.executable, "-c", text]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def kind_here() -> str:
    (kind,) = run_python("from megarlhf.reward.separation import separate\nprint(separate(network=True).kind)")
    return kind


def needs(kind: str) -> None:
    if kind_here() != kind:
        pytest.skip(f"this system gives {kind_here()}")


def make_scorer(path: Path, text: str, *, network: bool = False) -> RewardScorer:
    path.write_text(text)
    scorer = RewardScorer(
        function_path=str(path), rule=None, rule_pattern=None, timeout_seconds=20.0, network=network
    )
    scorer.check()
    return scorer


def test_reward_code_sees_its_own_processes_alone(
    tmp_path: Path, bystander: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs("namespaces")
    monkeypatch.setenv("MEGARLHF_TEST", MARK)
    scorer = make_scorer(tmp_path / "look.py", LOOK)
    assert [sample.reward for sample in scored_by(scorer, samples("a", label=str(bystander)))] == [0.0]
    assert caplog.records == []
    scorer.close()


@pytest.mark.parametrize("as_nobody", [False, True], ids=["same_user", "nobody"])
def test_namespaces_of_any_user(as_nobody: bool) -> None:
    needs("namespaces")
    if as_nobody and os.getuid() != 0:
        pytest.skip("only root can become another user")
    lines = run_python(f"AS_NOBODY = {as_nobody}\nAPART = lambda: separate(network=False).kind\n{TRY}")
    missing = "No such file or directory"
    assert lines == [
        "namespaces",
        *(f"{name} {missing}" for name in ("environ", "mem", "maps")),
        "cat 1",
        "signal No such process",
        "move ok",
        f"uid {65534 if as_nobody else os.getuid()}",
    ]


@pytest.mark.parametrize("network", [False, True])
def test_reward_code_has_a_network_where_it_is_given_one(tmp_path: Path, network: bool) -> None:
    needs("namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        scorer = make_scorer(tmp_path / "connect.py", CONNECT, network=network)
        (sample,) = scored_by(scorer, samples("a", label=server.getsockname()[1]))
    assert sample.reward == (11.0 if network else 1.0)
    scorer.close()


def test_code_without_a_network_is_told_who_gives_it_one(tmp_path: Path) -> None:
    needs("namespaces")
    scorer = make_scorer(tmp_path / "call.py", CALL)
    (sample,) = scored_by(scorer, samples("a"))
    assert sample.reward is None
    assert "Network is unreachable (reward code has no network unless reward_network gives it)" in str(
        scorer.last_failures
    )
    scorer.close()


def test_landlock_forbids_tcp() -> None:
    try:
        available = landlock_version()
    except OSError as error:
        pytest.skip(f"no Landlock: {error.strerror}")
    if available < 4:
        pytest.skip(f"Landlock {available}")
    text = """
import socket
from megarlhf.reward.separation import enter_landlock
server = socket.create_server(("127.0.0.1", 0))
for network in (True, False):
    enter_landlock(4, network=network)
    try:
        socket.create_connection(server.getsockname(), timeout=5)
    except PermissionError as error:
        print(network, error.strerror)
    else:
        print(network, "ok")
"""
    assert run_python(text) == ["True ok", "False Permission denied"]


@pytest.mark.parametrize("as_nobody", [False, True], ids=["same_user", "nobody"])
@pytest.mark.parametrize("version", [3, 6])
def test_landlock_of_any_user(as_nobody: bool, version: int) -> None:
    """Version 6 refuses signals as well; before it a process of the same user could be killed."""
    try:
        available = landlock_version()
    except OSError as error:
        pytest.skip(f"no Landlock: {error.strerror}")
    if available < version or (as_nobody and os.getuid() != 0):
        pytest.skip(f"Landlock {available}, user {os.getuid()}")
    lines = run_python(f"AS_NOBODY = {as_nobody}\nAPART = lambda: enter_landlock({version}, network=False)\n{TRY}")
    assert lines == [
        "None",
        *(f"{name} Permission denied" for name in ("environ", "mem", "maps")),
        "cat 1",
        "signal Operation not permitted" if version == 6 else "signal ok",
        "move ok",
        f"uid {65534 if as_nobody else os.getuid()}",
    ]


def test_a_system_without_namespaces_is_said_once(tmp_path: Path) -> None:
    """In a user namespace whose limit of further ones is 0, where the kernel refuses them as a container's host may."""
    needs("namespaces")
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1)")
    (tmp_path / "look.py").write_text(LOOK)
    refuse = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" "$@"'
    lines = run_python(
        f"""
import logging, os, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from megarlhf.reward.scorer import RewardScorer
from tests.reward.samples import samples, scored_by
scorer = RewardScorer(
    function_path={str(tmp_path / "look.py")!r}, rule=None, rule_pattern=None, timeout_seconds=20.0
)
for _ in range(2):
    scorer.check()
    (sample,) = scored_by(scorer, samples("a", label=str(os.getpid())))
    print("environment", sample.reward // 10 % 100)  # without thousands: other processes are in sight
    scorer.close()
""",
        *("unshare", "--user", "--map-root-user", "sh", "-c", refuse),
    )
    said, network, *seen = lines
    assert "(namespaces: No space left on device" in said
    assert network.startswith("reward code can use the network")
    if said.startswith("reward code can see the names of this run's processes, though not their environment"):
        assert seen == ["environment 0.0"] * 2  # Landlock
    else:
        assert said.startswith("reward code can read the environment and memory of this run's processes")


def test_a_process_that_leaves_its_group_ends_with_the_rest(tmp_path: Path) -> None:
    needs("namespaces")
    scorer = make_scorer(
        tmp_path / "daemon.py",
        "import os, subprocess\n"
        "subprocess.Popen(['setsid', 'sh', '-c', 'setsid sleep 60 & exit'], start_new_session=True).wait()\n"
        "while os.system('cat /proc/[0-9]*/comm | grep -q sleep'): pass\n"
        "def reward_func(queries, prompts, labels): return [1.0] * len(queries)",
    )
    (daemon,) = [process for process in psutil.Process().children(recursive=True) if process.name() == "sleep"]
    end = os.pidfd_open(daemon.pid)
    scorer.close()
    assert select.select([end], [], [], 10.0)[0], "a process descriptor becomes readable when the process ends"
    os.close(end)


def test_root_reads_the_files_of_others(tmp_path: Path) -> None:
    needs("namespaces")
    if os.getuid() != 0:
        pytest.skip("only root reads the files of others")
    (tmp_path / "answer").write_text("4")
    os.chown(tmp_path / "answer", 12345, 12345)
    (tmp_path / "answer").chmod(0o600)
    scorer = make_scorer(
        tmp_path / "read.py",
        f"def reward_func(q, p, l): return [float(open({str(tmp_path / 'answer')!r}).read())] * len(q)",
    )
    assert [sample.reward for sample in scored_by(scorer, samples("a"))] == [4.0]
    scorer.close()
