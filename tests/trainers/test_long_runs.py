"""What can go wrong after hours: the loop saves what is good, counts what it leaves out, and stops for a reason."""

import errno
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megarlhf.data.types import Prompt, Rollout, Sample
from megarlhf.engine.objective import NonFiniteError
from megarlhf.formats.run_checkpoints import SaveFailedError
from megarlhf.metrics.sinks import Sinks
from megarlhf.trainers import rl
from megarlhf.trainers.experience import NoSamplesError, enough_results
from megarlhf.trainers.precision import LogProbDifferenceError
from megarlhf.trainers.roles import RoleFailedError
from tests.trainers.plain_roles import PlainRoles
from tests.trainers.test_rl import run

ALL = [(group, sample) for group in range(4) for sample in range(2)]


class Failing(PlainRoles):
    """Raises `error` at the `nth` call of the method `where`, from 1."""

    def __init__(self, where: str, nth: int, error: Exception) -> None:
        super().__init__()
        self._where, self._left, self._error = where, nth, error

    def _count(self, where: str) -> None:
        self._left -= where == self._where
        if where == self._where and self._left == 0:
            raise self._error

    def score(self, rollout: Rollout) -> list[Sample]:
        self._count("score")
        return super().score(rollout)

    def generate(self, prompts: Sequence[Prompt], *, step: int, first_place: int = 0) -> Rollout:
        self._count("generate")
        return super().generate(prompts, step=step, first_place=first_place)

    def push(self, version: int) -> dict[str, float]:
        self._count("push")
        return super().push(version)

    def before_update(self, name: str) -> None:
        self._count(f"update {name}")


def test_steps_with_too_few_results_are_not_trained_and_end_the_run_saved(tmp_path: Path) -> None:
    plain = PlainRoles(without_result=ALL[:5])
    with pytest.raises(NoSamplesError, match=r"2 steps in a row .* no result for 5 samples") as failure:
        run(tmp_path, plain, batch={"train_iters": 9}, reward={"max_untrained_steps": 2, "min_result_fraction": 0.4})
    assert plain.events == [
        *("push 0", "evaluate", "generate 1", "push 1", "generate 2", "push 2", "evaluate", "rescue", "save 2"),
    ]
    unmoved = {"kl_controller": None, "reward_moments": None, "best": None}
    assert plain.saved[2] | unmoved == unmoved | {
        **{"step": 2, "consumed_prompts": 8, "untrained_steps": 2, "untrained_in_a_row": 2},
        **{"rollout_fallbacks": 0, "rollout_steps_left": 0, "consumed_before": 4, "unlogged": None},
    }
    assert "the state after step 2 is saved" in failure.value.__notes__[0]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("reward/untrained_steps") for row in rows] == [None, 1, 2]
    assert rows[2]["reward/no_result_count"] == 5 and rows[2]["reward/mean"] == pytest.approx(2 / 3)
    assert "policy/loss" not in rows[2] and "rollout/response_length_mean" in rows[2]


@pytest.mark.parametrize(("limit", "stops"), [(0.37, True), (0.375, False), (0.0, True), (None, False)])
def test_a_reward_that_fails_ends_the_run_before_it_trains_on_the_rest(
    tmp_path: Path, limit: float | None, stops: bool
) -> None:
    class Failing(PlainRoles):
        def score(self, rollout: Rollout) -> list[Sample]:
            self._without_result = set(ALL[:3]) if "generate 3" in self.events else set()
            parts = [replace(s, parts={"remote": s.reward, "rule": 1.0}) for s in super().score(rollout)]
            return parts

    plain = Failing()
    given = {"batch": {"train_iters": 3}, "reward": {"max_no_result_fraction": limit}}
    if not stops:
        run(tmp_path, plain, **given)
        return
    said = r"in step 3, .* no result for 3 of 8 samples \(remote for 3\); max_no_result_fraction=0"
    with pytest.raises(NoSamplesError, match=said) as failure:
        run(tmp_path, plain, **given)
    assert plain.events[-3:] == ["generate 3", "rescue", "save 2"]
    assert plain.saved[2]["consumed_prompts"] == 8 and plain.saved[2]["untrained_steps"] == 0
    assert "the state after step 2 is saved" in failure.value.__notes__[0]


def test_a_trained_step_ends_the_row_of_untrained_ones(tmp_path: Path) -> None:
    class Flaky(PlainRoles):
        def score(self, rollout: Rollout) -> list[Sample]:
            self._without_result = set(ALL) if "generate 3" not in self.events else set()
            if "generate 4" in self.events:
                self._without_result = set(ALL)
            return super().score(rollout)

    plain = Flaky()
    rows = run(tmp_path, plain, batch={"train_iters": 5}, reward={"max_untrained_steps": 3})
    assert [row.get("reward/untrained_steps") for row in rows] == [None, 1, 2, 2, 3, 4]
    assert plain.saved[5]["untrained_in_a_row"] == 2
    assert plain.events.count("update actor") == 2  # of step 3
    assert "reward/mean" not in rows[1] and rows[3]["reward/mean"] == 0.5


def test_the_least_fraction_is_that_of_usable_samples() -> None:
    assert enough_results(512, 1024, 0.5) and not enough_results(511, 1024, 0.5)
    assert not enough_results(16, 1024, 0.5) and enough_results(1, 1024, 0.0) and not enough_results(0, 1024, 0.0)


def test_a_step_with_fewer_results_makes_fewer_optimizer_steps(tmp_path: Path) -> None:
    plain = PlainRoles(without_result=ALL[::2])  # half of 8 samples, one of each prompt: 2 of 4 optimizer steps of 2
    run(tmp_path, plain, batch={"train_iters": 1, "global_batch_size": 2}, reward={"min_result_fraction": 0.5})
    sizes = [len(rows) for role, rows, _ in plain.updates if role == "actor"]
    assert sizes == [2, 2]


@pytest.mark.parametrize(
    ("plain", "saved"),
    [
        (Failing("score", 3, ValueError("the reward code is gone")), 1),  # the first call is the evaluation's
        (Failing("generate", 3, RoleFailedError("rollout rank 0 died", trains=False)), 2),
        (Failing("push", 3, RuntimeError("engine 0 holds weights version 1")), 2),  # of step 2, which is trained
        (Failing("update critic", 3, NonFiniteError("loss=nan")), 1),  # step 2's first: nothing has changed
        (Failing("update actor", 4, NonFiniteError("loss=nan")), 2),  # the last of step 2: it counts as made
    ],
    ids=["reward", "engine", "sync", "first loss", "last loss"],
)
def test_a_failure_saves_the_last_good_state_first(tmp_path: Path, plain: Failing, saved: int) -> None:
    with pytest.raises(type(plain._error), match=str(plain._error)) as failure:
        run(tmp_path, plain)
    assert plain.events[-2:] == ["rescue", f"save {saved}"]
    assert plain.saved[saved]["step"] == saved and plain.saved[saved]["consumed_prompts"] == 4 * saved
    assert f"after step {saved} is saved" in failure.value.__notes__[0]


@pytest.mark.parametrize(
    "plain",
    [
        Failing("update actor", 3, RoleFailedError("actor rank 1 died", trains=True)),
        Failing("update actor", 4, RuntimeError("out of memory")),  # in the middle of step 2
    ],
    ids=["role", "middle"],
)
def test_weights_of_no_step_are_not_saved(tmp_path: Path, plain: Failing) -> None:
    with pytest.raises(RuntimeError) as failure:
        run(tmp_path, plain)
    assert plain.saved == {} and "rescue" not in plain.events
    assert "the weights of step 1 are lost" in failure.value.__notes__[0]


def test_what_is_saved_already_is_not_saved_again(tmp_path: Path) -> None:
    plain = Failing("generate", 2, RoleFailedError("rollout rank 0 died", trains=False))
    with pytest.raises(RoleFailedError):
        run(tmp_path, plain, logging={"save_interval": 1})
    assert plain.events.count("save 1") == 1 and "rescue" not in plain.events
    plain = Failing("generate", 1, RoleFailedError("rollout rank 0 died", trains=False))
    with pytest.raises(RoleFailedError):
        run(tmp_path / "untouched", plain)
    assert plain.saved == {}  # nothing was trained


@pytest.mark.parametrize(
    ("where", "nth"), [("push", 3), ("score", 4)], ids=["the sync of step 2", "the evaluation of step 2"]
)
def test_a_step_that_is_saved_before_its_row_is_evaluated_and_logged_when_the_run_goes_on(
    tmp_path: Path, where: str, nth: int
) -> None:
    """Else its row and, where it was the best, its evaluation are missing."""
    options: dict[str, Any] = {"batch": {"train_iters": 4}}
    options["logging"] = {"eval_interval": 2, "best_metric": "eval/accuracy", "save_interval": 3}
    whole, rest = PlainRoles(), PlainRoles()
    broken = Failing(where, nth, RoleFailedError("rollout rank 0 died", trains=False))
    expected = run(tmp_path / "whole", whole, **options)
    with pytest.raises(RoleFailedError):
        run(tmp_path / "broken", broken, **options)
    found = run(tmp_path / "broken", rest, resume=json.loads(json.dumps(broken.saved[2])), **options)
    assert rest.events[:4] == ["push 2", "evaluate", "save 2", "generate 3"], "its evaluation is the best"
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4]
    for row, other in zip(found, expected, strict=True):
        assert untimed(row) == untimed(other)
    assert rest.saved[4] == whole.saved[4] and rest.saved[4]["best"]["step"] == 2


def untimed(row: dict[str, float]) -> dict[str, float]:
    """Without what is of the clock, and of the first step of a process."""
    return {key: value for key, value in row.items() if not key.startswith(("time/", "perf/", "memory/"))}


class Full(PlainRoles):
    """Has no room for the checkpoints of these steps."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self._steps = steps

    def save(self, step: int, run_state: dict[str, Any]) -> None:
        if step in self._steps:
            self.events.append(f"no room for {step}")
            raise SaveFailedError(f"the checkpoint of step {step} could not be written")
        super().save(step, run_state)


def test_a_full_disk_does_not_end_a_run_that_has_other_checkpoints_to_come(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The step that is not saved is not the best, whose checkpoint would be exported."""
    plain, options = Full(2, 4), {"save_interval": 2, "eval_interval": 3, "best_metric": "eval/reward_mean"}
    run(tmp_path, plain, batch={"train_iters": 7}, logging=options)
    asked = [event for event in plain.events if event.startswith(("save", "no room"))]
    assert asked == ["no room for 2", "save 3", "no room for 4", "save 6", "save 7"]
    goes_on = "could not be written; the run goes on, and saves again after step"
    assert [record.getMessage() for record in caplog.records if "written" in record.getMessage()] == [
        f"the checkpoint of step {step} {goes_on} {step + 2}: free space" for step in (2, 4)
    ]
    plain = Full(3)
    run(tmp_path / "best", plain, batch={"train_iters": 4}, logging=options)
    assert plain.saved[4]["best"] == {"metric": "eval/reward_mean", "step": 4, "value": 0.0}


def test_the_last_checkpoint_must_be_written(tmp_path: Path) -> None:
    plain = Full(2, 3)
    with pytest.raises(SaveFailedError, match="step 3 could not be written") as failure:
        run(tmp_path, plain, logging={"save_interval": 2})
    assert plain.events[-1] == "no room for 3" and "rescue" not in plain.events
    assert not hasattr(failure.value, "__notes__")


def test_a_save_that_fails_too_is_told_beside_the_cause(tmp_path: Path) -> None:
    class NoRoom(Failing):
        def save(self, step: int, run_state: dict[str, Any]) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match="gone") as failure:
        run(tmp_path, NoRoom("score", 4, ValueError("the reward code is gone")))
    assert "step 2 could not be saved (OSError: [Errno 28] No space left on device)" in failure.value.__notes__[0]


def test_a_full_disk_under_the_log_saves_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Sinks, step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Sinks, "log", full)
    plain = PlainRoles()
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, plain)
    assert list(plain.saved) == [2]


def test_log_probs_past_the_budget_stop_before_the_step_is_trained(tmp_path: Path) -> None:
    class Drifting(PlainRoles):
        def difference(self) -> float:
            return 0.6 if self.version == 1 else 0.0

    plain = Drifting()
    with pytest.raises(LogProbDifferenceError, match=r"logprob_diff_mean=0\.6 .* past 10 budgets"):
        run(tmp_path, plain)
    assert plain.events[-4:] == ["push 1", "generate 2", "rescue", "save 1"]


def test_reward_moments_and_kl_coefficient_are_those_of_the_saved_step(tmp_path: Path) -> None:
    algorithm = {"kl_target": 0.1, "kl_horizon": 100, "normalize_reward": True}
    plain = Failing("update critic", 3, NonFiniteError("loss=nan"))  # in step 2, whose rewards are scored already
    with pytest.raises(NonFiniteError):
        run(tmp_path, plain, algorithm=algorithm)
    assert plain.saved[1]["reward_moments"] == {"count": 8, "mean": 0.5, "squares": 2.0}
    assert plain.saved[1]["kl_controller"] == {"coef": pytest.approx(0.01 * (1 + 0.2 * 8 / 100))}


def test_evaluation_and_saving_are_not_in_the_steps_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clocked(PlainRoles):
        now = 0.0

        def generate(self, prompts: Sequence[Prompt], *, step: int, first_place: int = 0) -> Rollout:
            self.now += 3.0
            return super().generate(prompts, step=step, first_place=first_place)

        def answer(self, prompts: Sequence[Prompt], *, n_samples: int, temperature: float | None) -> Rollout:
            self.now += 100.0
            return super().answer(prompts, n_samples=n_samples, temperature=temperature)

        def push(self, version: int) -> dict[str, float]:
            self.now += 0.5
            return super().push(version)

    plain = Clocked()
    monkeypatch.setattr(rl.time, "perf_counter", lambda: plain.now)
    rows = run(tmp_path, plain, logging={"eval_interval": 1, "save_interval": 1})
    assert [row["time/step_seconds"] for row in rows[1:]] == [3.5, 3.5, 3.5]
    assert rows[1]["perf/samples_per_second"] == pytest.approx(8 / 3.5)


def test_a_resumed_run_goes_on_with_the_next_prompts_whatever_the_batch_size(tmp_path: Path) -> None:
    class Noting(PlainRoles):
        def __init__(self) -> None:
            super().__init__()
            self.drawn: list[int] = []

        def generate(self, prompts: Sequence[Prompt], *, step: int, first_place: int = 0) -> Rollout:
            self.drawn += [prompt.index for prompt in prompts]
            return super().generate(prompts, step=step, first_place=first_place)

    whole, first, rest = Noting(), Noting(), Noting()
    run(tmp_path / "whole", whole, batch={"train_iters": 4})
    run(tmp_path / "first", first, batch={"train_iters": 2})
    found = run(
        tmp_path / "rest",
        rest,
        batch={"train_iters": 6, "rollout_batch_size": 2},
        resume=json.loads(json.dumps(first.saved[2])),
    )
    assert first.drawn + rest.drawn == whole.drawn
    assert [row["data/epoch"] for row in found] == pytest.approx([10 / 6, 12 / 6, 14 / 6, 16 / 6])
