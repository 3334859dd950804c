"""The slowest rank of a role in a phase: by its own time, and told of when it stays the slowest."""

import logging
from collections.abc import Mapping

import pytest

from megarlhf.cluster.rank_seconds import RankSeconds, SlowestRanks, TimedRole
from megarlhf.metrics.keys import check_metrics


def roles(**names: int) -> tuple[dict[str, RankSeconds], SlowestRanks]:
    """Roles of so many ranks, two on a node."""
    seconds = {name: RankSeconds() for name in names}
    return seconds, SlowestRanks([TimedRole(n, [rank // 2 for rank in range(names[n])], seconds[n]) for n in names])


def note(seconds: RankSeconds, phase: str, taken: Mapping[int, float]) -> None:
    for rank, time in taken.items():
        seconds.note(phase, rank, time)


def test_of_a_step_each_phase_of_each_role_by_itself() -> None:
    seconds, slowest = roles(actor=3, critic=1)
    note(seconds["actor"], "experience", {0: 1.0, 1: 2.0, 2: 0.5})
    note(seconds["actor"], "experience", {0: 1.0, 1: 1.0, 2: 3.5})  # the reference's pass
    note(seconds["actor"], "train", {2: 4.0, 1: 6.0, 0: 4.0})
    note(seconds["critic"], "train", {0: 7.0})
    found = slowest.metrics()
    assert found == {
        "time/actor/experience/slowest_rank": 2.0,
        "time/actor/experience/slowest_seconds": 4.0,
        "time/actor/experience/slowest_ratio": 4.0 / 3.0,
        "time/actor/train/slowest_rank": 1.0,
        "time/actor/train/slowest_seconds": 6.0,
        "time/actor/train/slowest_ratio": 1.5,
        "time/critic/train/slowest_seconds": 7.0,  # there is no other rank
    }
    check_metrics(found)
    assert slowest.metrics() == {}, "the next step begins anew"


def test_an_engine_is_slow_by_the_token() -> None:
    """A fast one has taken more pieces, and may have been busy for longer."""
    seconds, slowest = roles(rollout=3)
    for engine, taken, tokens in ((0, 10.0, 4000), (1, 8.0, 800), (0, 2.0, 800), (2, 9.0, 1800)):
        seconds["rollout"].note("rollout", engine, taken, tokens=tokens)
    found = slowest.metrics()
    assert found["time/rollout/rollout/slowest_rank"] == 1.0
    assert found["time/rollout/rollout/slowest_seconds"] == 8.0
    assert found["time/rollout/rollout/slowest_ratio"] == pytest.approx((8 / 800) / (9 / 1800))


def test_a_rank_that_stays_behind_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    seconds, slowest = roles(actor=4)
    even, late, other = {0: 5.0, 1: 5.0, 2: 5.0}, {3: 10.5}, {0: 5.0, 2: 5.0, 3: 5.0, 1: 30.0}
    said = []
    for taken in (even | late, even | late, other, *[even | late] * 5, even | {3: 9.5}, *[even | late] * 3):
        note(seconds["actor"], "train", taken)
        with caplog.at_level(logging.WARNING):
            slowest.metrics()
        said.append(len(caplog.records))
        caplog.clear()
    assert said == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1], "three in a row, of one rank"


def test_the_warning_names_rank_node_and_phase(caplog: pytest.LogCaptureFixture) -> None:
    seconds, slowest = roles(critic=4)
    for _ in range(3):
        note(seconds["critic"], "experience", {0: 5.0, 1: 5.0, 2: 12.5, 3: 5.0})
        slowest.metrics()
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "critic rank 2, on node 1 of the plan, took 2.5 times the median rank's time in phase experience"
    )


def test_what_takes_no_time_is_not_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    seconds, slowest = roles(actor=2)
    for _ in range(4):
        note(seconds["actor"], "train", {0: 0.1, 1: 0.9})
        assert slowest.metrics()["time/actor/train/slowest_ratio"] == pytest.approx(9.0)
    assert not caplog.records
