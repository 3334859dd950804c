"""Who is counted in which phase, on which device."""

from dataclasses import replace

from megarlhf.planner.memory import RankBytes
from megarlhf.planner.memory_table import (
    GIB,
    PROCESS_BYTES,
    EngineBytes,
    RoleBytes,
    device_tables,
    host_table,
    misfits,
)

ACTOR = RankBytes(
    parameters=1 * GIB,
    gradients=2 * GIB,
    optimizer=4 * GIB,
    reference=8 * GIB,
    forward=16 * GIB,
    backward=32 * GIB,
    logits=64 * GIB,
)
CRITIC = RankBytes(parameters=100, gradients=200, optimizer=400, reference=0, forward=800, backward=1600, logits=0)
ENGINE = EngineBytes(weights=3 * GIB, kv_cache=5 * GIB, one_sequence=GIB, bucket=7 * GIB)
ALL: dict[str, RoleBytes] = {"actor": ACTOR, "critic": CRITIC, "rollout": ENGINE}


def totals(slots: dict[tuple[int, int], dict[str, RoleBytes]], *, colocated: bool) -> list[dict[str, int]]:
    tables = device_tables(slots, colocated=colocated, gpu=False)
    return [{phase: table.total(phase) for phase in table.phases} for table in tables]


def test_roles_that_take_turns() -> None:
    assert totals({(0, 0): ALL}, colocated=True) == [
        {
            "rollout": 8 * GIB,
            "experience": (1 + 4 + 8 + 16 + 64) * GIB + 500,
            "update actor": (1 + 2 + 4 + 32 + 64) * GIB + 500,
            "update critic": (1 + 4) * GIB + 100 + 200 + 400 + 1600,
            "sync": (1 + 3 + 7) * GIB,
            "save": (1 + 4) * GIB + 500,
        }
    ]


def test_roles_with_devices_of_their_own_never_sleep() -> None:
    apart: dict[tuple[int, int], dict[str, RoleBytes]] = {
        (0, 0): {"actor": ACTOR},
        (0, 1): {"critic": CRITIC},
        (0, 2): {"rollout": ENGINE},
    }
    actor, critic, rollout = totals(apart, colocated=False)
    assert actor == {"experience": 93 * GIB, "update": 103 * GIB, "save": 5 * GIB}
    assert critic == {"experience": 1300, "update": 2300, "save": 500}
    assert rollout == {"rollout": 8 * GIB, "sync": 15 * GIB, "save": 8 * GIB}


def test_buckets_of_weights_are_there_in_a_sync() -> None:
    """Two GiB of them: of the rank alone where the engine reads them there, of either where they are sent."""
    actor, engine = replace(ACTOR, weight_buckets=2 * GIB), replace(ENGINE, weight_buckets=2 * GIB)

    def syncs(slots: dict[tuple[int, int], dict[str, RoleBytes]], *, colocated: bool) -> list[int | None]:
        return [phases.get("sync") for phases in totals(slots, colocated=colocated)]

    shared: dict[str, RoleBytes] = {"actor": actor, "rollout": ENGINE}
    assert syncs({(0, 0): shared, (0, 1): {"actor": actor}}, colocated=True) == [(1 + 3 + 7 + 2) * GIB, (1 + 2) * GIB]
    sent: dict[tuple[int, int], dict[str, RoleBytes]] = {(0, 0): {"actor": actor}, (0, 1): {"rollout": engine}}
    sent |= {(0, 2): {"critic": CRITIC}}
    assert syncs(sent, colocated=False) == [(1 + 4 + 2) * GIB, (3 + 5 + 7 + 2) * GIB, None]
    (table,) = device_tables({(0, 0): shared}, colocated=True, gpu=False)
    assert "actor    weight buckets        -           -       -   2.00     -" in table.text(None).splitlines()


def test_the_fullest_device_is_shown_and_processes_are_counted_on_gpus() -> None:
    slots: dict[tuple[int, int], dict[str, RoleBytes]] = {
        (0, 0): {"critic": CRITIC},
        (0, 1): {"critic": ACTOR},
        (0, 2): {"critic": CRITIC},
    }
    (table,) = device_tables(slots, colocated=True, gpu=True)
    assert table.devices == "device 1, the fullest of 3 (critic)"
    (elsewhere,) = device_tables({(1, n): held for (_, n), held in slots.items()}, colocated=True, gpu=True)
    assert elsewhere.devices == table.devices, "one node needs no number"
    (spread,) = device_tables({(n, 0): held for (_, n), held in slots.items()}, colocated=True, gpu=True)
    assert spread.devices == "device 0 of node 1, the fullest of 3 (critic)"
    assert table.peak_phase == "update"
    assert table.total("update") == 103 * GIB + int(0.05 * 103 * GIB) + PROCESS_BYTES
    said = table.text(120 * GIB).splitlines()
    assert said[-1] == "peak: update, 109.15 GiB, 10.85 GiB of 120 left"
    assert "critic  activations         16.00   32.00     -" in said


def test_what_does_not_fit() -> None:
    tables = device_tables({(0, 0): ALL}, colocated=True, gpu=False)
    assert misfits(tables, ENGINE, 103 * GIB + 500) == []
    ((phase, said),) = misfits(tables, ENGINE, 103 * GIB)
    assert phase == "update actor"
    assert f"phase update actor takes 103.00 GiB ({103 * GIB + 500} bytes)" in said
    assert "most of it logits of role actor (64.00 GiB)" in said
    small = EngineBytes(weights=3 * GIB, kv_cache=GIB // 2, one_sequence=GIB, bucket=0)
    assert [phase for phase, _ in misfits([], small, 103 * GIB)] == ["rollout"]


JUDGE = RankBytes(parameters=9, gradients=0, optimizer=0, reference=0, forward=5, backward=7, logits=0)


def test_what_stays_on_the_devices() -> None:
    """The reference, 8 GiB, and the judge's 9 bytes are in every phase then."""
    slots: dict[tuple[int, int], dict[str, RoleBytes]] = {(0, 0): ALL | {"reward": JUDGE}}
    (away,), (stays,) = (device_tables(slots, colocated=True, gpu=False, resident=kept) for kept in (False, True))
    more = {phase: stays.total(phase) - away.total(phase) for phase in stays.phases}
    own = {"experience": 9, "reward": 8 * GIB}
    assert more == {phase: own.get(phase, 8 * GIB + 9) for phase in away.phases}


def test_one_role_gathers_its_optimizer_at_a_time() -> None:
    held: dict[str, RoleBytes] = {"actor": replace(ACTOR, gathered=7), "critic": replace(CRITIC, gathered=11)}
    (table,) = device_tables({(0, 0): held}, colocated=True, gpu=False)
    assert table.total("save") == 5 * GIB + 500 + 11 and ("critic", "gathered") in table.phases["save"]


def test_the_hosts_of_two_nodes() -> None:
    """The second node has the critic alone, which is stepped there."""
    critic = replace(CRITIC, optimizer=0, host_optimizer=20 * GIB, host_gathered=30 * GIB)
    slots: dict[tuple[int, int], dict[str, RoleBytes]] = {
        (0, 0): {"actor": replace(ACTOR, host_gathered=3)},
        (0, 1): {"actor": ACTOR},
    }
    slots |= {(1, 0): {"critic": critic, "rollout": ENGINE}, (1, 1): {"critic": critic, "reward": JUDGE}}

    def table(**options: bool) -> dict[str, dict[tuple[str, str], int]]:
        usual = {"colocated": True, "resident": False, "gpu": True}
        return host_table(slots, **(usual | options)).phases

    steps = {("critic", "asleep"): 200, ("critic", "stepped here"): 40 * GIB, ("rollout", "asleep"): 3 * GIB}
    judge = {("reward", "asleep"): 9}
    assert table() == {"steps": steps | judge, "save": steps | judge | {("critic", "checkpoint"): 60 * GIB}}
    assert table(resident=True)["steps"] == steps, "a judge that stays has no copy"
    assert table(colocated=False)["steps"] == {("critic", "stepped here"): 40 * GIB}
    del slots[1, 0], slots[1, 1]
    assert table(gpu=False) == {
        "steps": {("actor", "asleep"): 2 * (1 + 4 + 8) * GIB},
        "save": {("actor", "asleep"): 2 * (1 + 4 + 8) * GIB, ("actor", "checkpoint"): 3},
    }
    assert table(resident=True)["steps"] == {("actor", "asleep"): 2 * (1 + 4) * GIB}
