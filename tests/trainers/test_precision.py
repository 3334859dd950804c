"""FP8 in the loop: who leaves it where log-probs are past their budget, for how long, and what is logged and saved."""

import json
from pathlib import Path
from typing import Any

import pytest

from megarlhf.config.precision import EnginePhase
from megarlhf.trainers.precision import LogProbDifferenceError
from megarlhf.trainers.roles import Roles
from tests.trainers.plain_roles import PlainRoles
from tests.trainers.test_rl import run

ONE_PASS = {"init_kl_coef": 0.0}
STEPS = {"train_iters": 5, "global_batch_size": 4, "n_samples_per_prompt": 2}


class InFp8(PlainRoles):
    """Log-probs are `off` while the phases named so are in FP8."""

    def __init__(self, off: float, *causes: str, trainer: str = "") -> None:
        super().__init__()
        self.in_fp8, self._off, self._causes, self.trainer = True, off, causes, trainer

    def difference(self) -> float:
        present = {"rollout": self.in_fp8, self.trainer: bool(self.trainer)}
        return self._off if any(present.get(cause) for cause in self._causes) else 0.0

    def roles(self, *, critic: bool) -> Roles:
        roles = super().roles(critic=critic)
        actor: Any = roles.actor

        def fall_back(phase: EnginePhase, why: str) -> bool:
            if phase != self.trainer:
                return False
            self.events.append(f"{phase} leaves: {why.split(':')[0]}")
            self.trainer = ""
            return True

        actor.fall_back = fall_back
        actor.precision_report = lambda: ({"train/fp8": 0.0, "train/amax": 7.0}, ["train leaves fp8 for a test"])
        return roles


def restarts(plain: PlainRoles) -> list[str]:
    return [event for event in plain.events if "fp8" in event or "push" in event or "leaves" in event]


def test_the_engines_leave_fp8_for_some_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Past ten budgets too, where the run would stop without FP8."""
    plain, precision = InFp8(0.7, "rollout"), {"rollout_dtype": "fp8", "fp8_fallback_steps": 2}
    rows = run(tmp_path, plain, batch=STEPS, precision=precision, logging={"save_interval": 1})
    assert restarts(plain) == [
        *("push 0", "restart out of fp8", "push 1", "push 2", "restart in fp8", "push 3"),
        *("restart out of fp8", "push 4", "push 5"),
    ]
    assert [row.get("precision/rollout/fp8") for row in rows] == [None, 1, 0, 0, 1, 0]
    assert [row.get("precision/rollout/fallbacks") for row in rows] == [None, 1, 1, 1, 2, 2]
    said = "rollout leaves fp8 for fp32 for 2 steps (fp8_fallback_steps=2): rollout/logprob_diff_mean=0.7 is past"
    assert caplog.text.count(said) == 2
    assert caplog.text.count("rollout computes in fp8 again") == 1

    rest = InFp8(0.7, "rollout")
    run(tmp_path, rest, batch=STEPS, precision=precision, resume=json.loads(json.dumps(plain.saved[2])))
    assert restarts(rest)[:4] == ["restart out of fp8", "push 2", "restart in fp8", "push 3"]


def test_for_good(tmp_path: Path) -> None:
    plain = InFp8(0.2, "rollout")
    run(tmp_path, plain, batch=STEPS, precision={"rollout_dtype": "fp8"})
    assert restarts(plain) == ["push 0", "restart out of fp8", *(f"push {step}" for step in range(1, 6))]


@pytest.mark.parametrize("phase", ["log_prob", "train"])
def test_the_trainer_leaves_before_the_engines(tmp_path: Path, phase: str, caplog: pytest.LogCaptureFixture) -> None:
    """Log-probs of a pass of their own are taken again at once, and nothing is left to blame the engines for."""
    plain = InFp8(0.2, phase, trainer=phase)
    precision = {"rollout_dtype": "fp8", f"{phase}_dtype": "fp8"}
    algorithm = {"advantage_estimator": "rloo"} | (ONE_PASS if phase == "train" else {})
    batch = STEPS | {"global_batch_size": 8, "train_iters": 3}
    rows = run(tmp_path, plain, batch=batch, precision=precision, algorithm=algorithm)
    left = f"{phase} leaves: rollout/logprob_diff_mean=0.2 is past logprob_diff_budget=0.05"
    assert restarts(plain) == ["push 0", left, "push 1", "push 2", "push 3"]
    expected = 0.2 if phase == "train" else 0.0  # what its step was trained with
    assert rows[1]["rollout/logprob_diff_mean"] == pytest.approx(expected, abs=1e-6)
    assert (rows[1]["precision/train/fp8"], rows[1]["precision/train/amax"]) == (0.0, 7.0)
    assert caplog.text.count("train leaves fp8 for a test") == 3


def test_both_are_to_blame(tmp_path: Path) -> None:
    plain = InFp8(0.2, "rollout", trainer="log_prob")
    precision = {"rollout_dtype": "fp8", "log_prob_dtype": "fp8"}
    run(tmp_path, plain, batch=STEPS | {"train_iters": 1}, precision=precision)
    assert restarts(plain)[1:] == [
        "log_prob leaves: rollout/logprob_diff_mean=0.2 is past logprob_diff_budget=0.05",
        *("restart out of fp8", "push 1"),
    ]


def test_a_run_stops_where_no_phase_is_in_fp8_any_more(tmp_path: Path) -> None:
    class Always(InFp8):
        def difference(self) -> float:
            return 0.7

    with pytest.raises(LogProbDifferenceError, match="past 10 budgets"):
        run(tmp_path, Always(0.7), batch=STEPS, precision={"rollout_dtype": "fp8"})
