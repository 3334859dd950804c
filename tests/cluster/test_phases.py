"""Who sleeps and wakes, and in which order: at the start, in each phase, and in a run of real engines."""

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from megarlhf.cluster.launch import start_workers
from megarlhf.cluster.resource_manager import ResourceManager
from megarlhf.config.roles import PARTS
from megarlhf.metrics.timers import Timers
from tests.cluster.recorded_groups import RecordedGroup
from tests.cluster.runs import SMALL, metrics, run, write_inputs

Log = list[tuple[str, str, tuple[Any, ...]]]


def manager(
    log: Log,
    *,
    colocated: bool = True,
    show: Callable[[str], None] = lambda name: None,
    models: Sequence[str] = ("actor", "critic"),
) -> ResourceManager:
    groups = [
        RecordedGroup(
            role,
            log,
            ranks=2,
            largest_bytes=lambda rank, args: {"parameters": (1 + rank) * 2**30, "gradients": (2 - rank) * 2**29},
        )
        for role in (*models, "rollout")
    ]
    return ResourceManager(groups[:-1], groups[-1], show, colocated=colocated)


def said(log: Log) -> list[str]:
    """Calls since the last time, as words: which role, sleep or wake, of what."""
    shown = {True: "keeping weights", False: "dropping weights"}
    words = [
        " ".join([role, method, *(shown[a] if isinstance(a, bool) else "+".join(a) for a in arguments)])
        for role, method, arguments in log
    ]
    log.clear()
    return words


START = ["rollout sleep dropping weights", "actor wake parameters", "rollout wake weights"]  # of the first sync
TRAIN = [
    "rollout sleep dropping weights",
    "actor wake parameters+optimizer",
    "critic wake parameters+optimizer",
]


def test_a_step_from_the_start_to_the_checkpoint() -> None:
    """Who leaves sleeps before who comes wakes; nothing is moved twice."""
    log: Log = []
    phases = manager(log)
    with phases.sync():  # the engines have just started, the training roles sleep
        assert said(log) == START
    with phases.evaluate():
        assert said(log) == ["actor sleep parameters", "rollout wake kv_cache"]
    with phases.rollout():
        assert said(log) == []
    with phases.train():
        assert said(log) == TRAIN
    with phases.sync():
        assert said(log) == ["actor sleep optimizer", "critic sleep parameters+optimizer", "rollout wake weights"]
    with phases.rollout():
        assert said(log) == ["actor sleep parameters", "rollout wake kv_cache"]
    with phases.save():  # the next rollout has the same weights
        assert said(log) == ["rollout sleep keeping weights", *TRAIN[1:]]
    with phases.rollout():
        sleeping = [f"{role} sleep parameters+optimizer" for role in ("actor", "critic")]
        assert said(log) == [*sleeping, "rollout wake weights+kv_cache"]


def test_reward_models_wake_to_score_and_the_engines_keep_weights_that_nobody_replaces() -> None:
    log: Log = []
    phases = manager(log, models=("actor", "reward"))
    with phases.sync():
        pass
    with phases.evaluate():
        said(log)
    with phases.judge():
        assert said(log) == ["rollout sleep keeping weights", "reward wake parameters"]
    with phases.rollout():
        assert said(log) == ["reward sleep parameters", "rollout wake weights+kv_cache"]
    with phases.reward(is_last=False):
        assert said(log) == ["rollout sleep keeping weights", "reward wake parameters"]
    with phases.rollout():
        assert said(log) == ["reward sleep parameters", "rollout wake weights+kv_cache"]
    with phases.reward():
        assert said(log) == ["rollout sleep dropping weights", "reward wake parameters"]
    with phases.train():
        assert said(log) == ["reward sleep parameters", "actor wake parameters+optimizer"]
    with phases.sync():
        assert said(log) == ["actor sleep optimizer", "rollout wake weights"]
    assert {"reward", "eval"} <= {name.split("/")[1].removesuffix("_seconds") for name in phases.seconds()}


def test_the_end_of_a_run() -> None:
    log: Log = []
    phases = manager(log)
    with phases.train():
        pass
    with phases.sync():
        said(log)
    with phases.save():
        assert said(log) == ["rollout sleep keeping weights", "actor wake optimizer", TRAIN[2]]
    with phases.export():  # the critic's weights too, for --save_value_network
        assert said(log) == ["actor sleep optimizer", "critic sleep optimizer"]


def test_a_run_that_continues_loads_before_its_first_sync() -> None:
    log: Log = []
    phases = manager(log)
    with phases.load():
        assert said(log) == ["rollout sleep keeping weights", *TRAIN[1:]]
    with phases.sync():
        assert said(log) == ["actor sleep optimizer", "critic sleep parameters+optimizer", "rollout wake weights"]


def test_a_phase_inside_another_has_the_devices() -> None:
    log: Log = []
    phases = manager(log)
    with phases.train():
        said(log)
        with phases.save():
            assert said(log) == []
        with phases.export():
            assert said(log) == ["actor sleep optimizer", "critic sleep optimizer"]


def test_a_phase_is_shown_timed_and_given_the_devices_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    log: Log = []
    shown: list[str] = []
    phases, now = manager(log, show=shown.append), [0.0]
    monkeypatch.setattr(phases, "_timers", Timers(lambda: now[0]))
    for seconds, phase in enumerate(("rollout", "reward", "train", "sync", "evaluate", "save", "load", "export"), 1):
        with getattr(phases, phase)():
            now[0] += seconds
            if phase == "train":
                with phases.experience():
                    now[0] += 0.25
            if phase == "reward":
                log.append(("scoring", "", ()))
    assert shown == ["rollout", "reward", "train", "experience", "sync", "eval", "save", "load", "export"]
    order = [role for role, *_ in log]
    assert order[:2] == ["scoring", "rollout"], "no device is given or taken for the reward"
    assert phases.seconds() == {
        "time/rollout_seconds": 1.0,
        "time/reward_seconds": 2.0,
        "time/train_seconds": 3.0,
        "time/experience_seconds": 0.25,
        "time/sync_seconds": 4.0,
        "time/eval_seconds": 5.0,
        "time/save_seconds": 6.0,
    }
    assert phases.seconds() == {}


def test_disjoint_roles_never_sleep() -> None:
    log: Log = []
    phases = manager(log, colocated=False)
    for phase in (phases.sync, phases.rollout, phases.train, phases.save, phases.rollout, phases.export):
        with phase():
            pass
    assert said(log) == []


@pytest.mark.parametrize("colocated", [True, False])
def test_a_rescue_ends_what_is_not_trained_and_asks_it_nothing_more(colocated: bool) -> None:
    log: Log = []
    phases = manager(log, colocated=colocated, models=("actor", "reward", "critic"))
    with phases.sync():
        said(log)
    with phases.rollout():
        said(log)
    with phases.reward():  # in which the reward model dies
        said(log)
    with phases.rescue():
        assert said(log) == ["rollout kill", "reward kill", *(TRAIN[1:] if colocated else [])]
    with phases.save():
        assert said(log) == []


def test_the_ledger_is_that_of_the_fullest_device() -> None:
    assert manager([]).memory() == {
        f"memory/{role}/{part}": value
        for role in ("actor", "critic")
        for part, value in (("parameters_gib", 2.0), ("gradients_gib", 1.0))
    }


class Starting(RecordedGroup):
    """A group whose processes start when they are waited for, as late as can be."""

    def submit(self, method: str, *args: Any) -> list[Any]:
        self._log.append((self.role.name, f"submit {method}", args))
        return [lambda: self._log.append((self.role.name, f"{method}ed", ()))]

    def wait_for(self, refs: Sequence[Any], what: str, *, timeout_seconds: float | None = None) -> list[Any]:
        assert timeout_seconds is not None and 0 < timeout_seconds <= 7.0, "one limit for all of them"
        return super().wait_for(refs, what)


@pytest.mark.parametrize("colocated", [True, False])
def test_roles_that_share_devices_start_one_after_another_and_engines_last(colocated: bool) -> None:
    log: Log = []
    groups: Any = {role: Starting(role, log) for role in ("actor", "critic", "rollout")}
    start_workers(groups, "/rendezvous", 7.0, colocated=colocated)
    assert {args for _, method, args in log if method == "submit start"} == {
        ("file:///rendezvous/actor",),
        ("file:///rendezvous/critic",),
        (),
    }
    order = [f"{role} {method}" for role, method, _ in log]
    if colocated:
        training = [[f"{role} submit start", f"{role} started", f"{role} sleep"] for role in ("actor", "critic")]
        assert order == [*training[0], *training[1], "rollout submit start", "rollout started"]
        assert all(args == (PARTS,) for _, method, args in log if method == "sleep")
    else:
        assert order == [f"{role} {what}" for what in ("submit start", "started") for role in groups]


def notes(logs: Path) -> list[tuple[str, str, dict[str, int]]]:
    """(role, what it was told, bytes by part that it then held) by time, from the logs of a run."""
    line_of = re.compile(r"(\d+\.\d{3}) ((?:start|sleep|wake)[^;]*)(?:; bytes on the device: (.*))?")
    found = []
    for path in logs.iterdir():
        for line in path.read_text().splitlines():
            if matched := line_of.fullmatch(line):
                pairs = [pair.split("=") for pair in (matched[3] or "").split()]
                held = {part: int(number) for part, number in pairs}
                found.append((float(matched[1]), path.stem.split("-")[0], matched[2], held))
    return [entry[1:] for entry in sorted(found, key=lambda entry: entry[0])]


@pytest.fixture(scope="module")
def finished(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a critic, a rank each, and a checkpoint after each step; all on the same cores."""
    directory = tmp_path_factory.mktemp("colocated")
    flags = SMALL | write_inputs(directory) | {"--pretrain": str(assets / "model"), "--save": str(directory / "run")}
    run("train_ppo", flags | {"--train-iters": "2", "--save-interval": "1"})
    return directory / "run"


def sorted_where_at_once(order: list[str]) -> list[str]:
    """Training roles that are told alike are told at the same time, and answer in any order."""
    runs = groupby(order, key=lambda entry: ("rollout" in entry, entry.split()[1]))
    return [entry for _, run_of in runs for entry in sorted(run_of)]


@pytest.mark.slow
def test_real_engines_take_turns(finished: Path) -> None:
    order = sorted_where_at_once([f"{role} {told}" for role, told, _ in notes(finished / "logs")])
    everything = "+".join(PARTS)
    sleeps = [f"{role} sleep parameters+optimizer" for role in ("actor", "critic")]
    wakes = [f"{role} wake parameters+optimizer" for role in ("actor", "critic")]
    generate = ["actor sleep parameters", "rollout wake kv_cache"]
    train = ["rollout sleep, weights dropped", *wakes]
    sync = ["actor sleep optimizer", sleeps[1], "rollout wake weights"]
    expected = [
        *("actor start", f"actor sleep {everything}", "critic start", f"critic sleep {everything}", "rollout start"),
        *("rollout sleep, weights dropped", "actor wake parameters", "rollout wake weights"),
        *generate,
        *train,
        *sync,
        *("rollout sleep, weights kept", "actor wake optimizer", wakes[1]),  # the checkpoint
        *(*sleeps, "rollout wake weights+kv_cache"),
        *train,
        *sync,
        *generate,  # the last evaluation
        *("rollout sleep, weights kept", *wakes),
        *("actor sleep optimizer", "critic sleep optimizer"),  # the export, of the critic too where asked for
    ]
    assert order == sorted_where_at_once(expected)


@pytest.mark.slow
def test_what_sleeps_leaves_the_device(finished: Path) -> None:
    """All but what vLLM has mapped: on a CPU it reads the actor's parameters where they are, from the first sync on."""
    awake: dict[str, set[str]] = {"actor": set(PARTS), "critic": set(PARTS)}
    mapped = False
    for role, told, held in notes(finished / "logs"):
        mapped = mapped or told == "wake weights"
        if role != "rollout" and told != "start":
            what, parts = told.split(" ")
            moved = set(parts.split("+"))
            awake[role] = awake[role] - moved if what == "sleep" else awake[role] | moved
            stays = {"parameters"} if mapped and role == "actor" else set()
            assert {part for part, number in held.items() if number} <= awake[role] | stays, (role, told, held)
            assert held["gradients"] == held["reference"] == 0
            assert bool(held["parameters"]) == ("parameters" in awake[role] | stays)


@pytest.mark.slow
def test_the_run_logs_how_large_each_part_is(finished: Path) -> None:
    rows = metrics(finished)
    sizes = {key: value * 2**30 for key, value in rows[1].items() if key.startswith("memory/")}
    assert len(sizes) == 8 and not any(key.startswith("memory/") for key in (*rows[0], *rows[2]))
    for role in ("actor", "critic"):
        weights = sizes[f"memory/{role}/parameters_gib"]
        assert weights > 1e5 and sizes[f"memory/{role}/gradients_gib"] == pytest.approx(weights, rel=0.01)  # float32
        assert sizes[f"memory/{role}/optimizer_gib"] == pytest.approx(2 * weights, rel=0.01)
    assert sizes["memory/actor/reference_gib"] == pytest.approx(sizes["memory/actor/parameters_gib"], rel=0.01)
    assert sizes["memory/critic/reference_gib"] == 0
