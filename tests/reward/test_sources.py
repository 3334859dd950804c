"""The sum of several sources of rewards."""

import logging
import threading
import time

import pytest

from megarlhf.data.types import Floats, Rollout
from megarlhf.reward.model import RewardModel
from megarlhf.reward.sources import Outcome, SourceResult, SumOfSources
from megarlhf.trainers.summary import sample_metrics
from tests.reward.samples import samples


class Said:
    """A source that says what it is told."""

    def __init__(self, name: str, *rewards: float | None, wrong: str | None = None, **logs: list[float | None]) -> None:
        self.name, self.rewards, self.wrong, self.logs = name, rewards, wrong, logs
        self.closed = threading.Event()

    def check(self) -> None:
        if self.wrong is not None:
            raise ValueError(self.wrong)

    def score(self, rollout: Rollout) -> SourceResult:
        outcomes: list[Outcome] = [(r, None) if r is not None else (None, "it is lost") for r in self.rewards]
        return SourceResult(outcomes=outcomes, logs=self.logs)

    def close(self) -> None:
        self.closed.set()


class Waits(Said):
    """A source that answers when it is closed."""

    def score(self, rollout: Rollout) -> SourceResult:
        assert self.closed.wait(20), "nobody closed it"
        return super().score(rollout)


class Computes:
    """A model that computes until it is stopped."""

    def __init__(self) -> None:
        self.begun, self.stopped = threading.Event(), threading.Event()

    def scores(self, rollout: Rollout, *, eos: int | None) -> Floats:
        self.begun.set()
        assert self.stopped.wait(20), "nobody stopped it"
        raise RuntimeError("its processes have ended")

    def stop(self) -> None:
        self.stopped.set()


class Interrupted(Said):
    """A source in which the user's interruption arrives."""

    def score(self, rollout: Rollout) -> SourceResult:
        raise KeyboardInterrupt


def test_the_reward_is_the_weighted_sum_and_one_without_a_result_leaves_none(caplog: pytest.LogCaptureFixture) -> None:
    model = Said("reward_model", 0.5, -2.0, None, 3.0, length=[4.0, 5.0, None, 7.0])
    rule = Said("rule", 1.0, 0.0, 1.0, None)
    scored = SumOfSources([model, rule], [2.0, -3.0]).score(Rollout(samples=samples(*"abcd"), tokens=()))
    assert [sample.reward for sample in scored] == [2 * 0.5 - 3 * 1.0, 2 * -2.0, None, None]
    assert scored[2].parts == {"reward_model": None, "reward_model/length": None, "rule": 1.0}
    assert "1 of 4 samples have no reward from rule: 1 x it is lost" in caplog.text
    metrics = sample_metrics(scored, [s for s in scored if s.reward is not None])
    assert metrics["reward/mean"] == -3.0 and metrics["reward/no_result_count"] == 2
    assert metrics["reward/reward_model/mean"] == pytest.approx((0.5 - 2.0 + 3.0) / 3)
    assert metrics["reward/reward_model/length/mean"] == pytest.approx(16 / 3)
    assert metrics["reward/rule/no_result_count"] == 1 and metrics["reward/rule/mean"] == pytest.approx(2 / 3)


def test_numbers_that_some_samples_lack_are_means_of_the_others() -> None:
    first = SumOfSources([Said("remote", 1.0, 2.0)]).score(Rollout(samples=samples(*"ab"), tokens=()))
    second = SumOfSources([Said("remote", 3.0, depth=[6.0])]).score(Rollout(samples=samples("c"), tokens=()))
    metrics = sample_metrics([*first, *second], [*first, *second])
    assert metrics["reward/remote/mean"] == 2.0 and metrics["reward/remote/depth/mean"] == 6.0
    assert metrics["reward/remote/depth/no_result_count"] == 2


def test_all_mistakes_are_said_at_once() -> None:
    wrong = SumOfSources([Said("a", wrong="a=1 is wrong"), Said("b"), Said("c", wrong="c=2 is wrong")])
    with pytest.raises(ValueError, match="^a=1 is wrong\nc=2 is wrong$"):
        wrong.check()


def test_sources_are_asked_side_by_side_and_an_interruption_ends_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    waits, start = Waits("remote", 1.0), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        SumOfSources([Interrupted("function"), waits]).score(Rollout(samples=samples("a"), tokens=()))
    assert waits.closed.is_set() and time.monotonic() - start < 15


def test_an_interruption_does_not_wait_for_a_reward_model() -> None:
    tokens = {"policy_tokenizer": None, "apply_chat_template": False, "max_tokens": 9, "normalize": False}
    model, start = RewardModel("reward_model", "reward", "m", option="o", **tokens), time.monotonic()
    model.close()  # it is not there yet
    model.model = computes = Computes()

    class InterruptedLater(Interrupted):
        def score(self, rollout: Rollout) -> SourceResult:
            assert computes.begun.wait(20)
            return super().score(rollout)

    with pytest.raises(KeyboardInterrupt):
        SumOfSources([InterruptedLater("function"), model]).score(Rollout(samples=samples("a"), tokens=()))
    assert computes.stopped.is_set() and time.monotonic() - start < 15
