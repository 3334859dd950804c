"""The loop's order, what it hands to whom, and what it does when something is missing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarlhf.data.prompts import PromptData
from megarlhf.data.types import starts_of
from megarlhf.engine.engine import NonFiniteError
from megarlhf.metrics.sinks import Sinks
from megarlhf.trainers import rl
from megarlhf.trainers.experience import NoSamplesError
from megarlhf.trainers.precision import LogProbDifferenceError
from megarlhf.trainers.state import LoopState
from tests.trainers.plain_roles import PlainRoles, make_config, make_prompts


def run(
    tmp_path: Path,
    plain: PlainRoles,
    *,
    stop_after: int | None = None,
    resume: dict[str, Any] | None = None,
    count: int = 6,
    **options: Any,
) -> list[dict[str, float]]:
    """Run the loop, from the state `resume` if given, and return the logged rows."""
    config = make_config(tmp_path, **options)
    state = LoopState.fresh(config.algorithm)
    if resume is not None:
        state.restore(resume)
    sinks = Sinks(tmp_path, total_steps=config.batch.train_iters, resumed_step=state.step or None)
    critic = config.algorithm.advantage_estimator == "gae"
    rl.train(
        config,
        plain.roles(critic=critic),
        PromptData(prompts=make_prompts(count), num_dropped=2),
        {"": make_prompts(2)},
        state,
        sinks,
        lambda: stop_after is not None and f"push {stop_after}" in plain.events,
    )
    sinks.close()
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_order_of_a_ppo_step(tmp_path: Path) -> None:
    plain = PlainRoles()
    rows = run(tmp_path, plain, batch={"train_iters": 2}, logging={"save_interval": 1})
    step = ["update critic", "update actor"] * 2  # 8 samples in batches of 4
    assert plain.events == [
        *("push 0", "evaluate", "generate 1", *step, "push 1", "save 1"),
        *("generate 2", *step, "push 2", "evaluate", "save 2"),
    ]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["data/prompts_dropped"] == 2
    assert rows[2]["reward/mean"] == 0.5
    assert rows[2]["kl/mean"] == pytest.approx(0.5)  # k1 of -1 against -1.5
    assert rows[2]["rollout/truncated_frac"] == 0.5
    assert rows[2]["eval/accuracy"] == 0.0  # greedy samples are sample 0, whose reward is 0


def test_actor_rests_while_the_critic_warms_up(tmp_path: Path) -> None:
    plain = PlainRoles()
    run(tmp_path, plain, freezing_actor_steps=2)
    first, rest = plain.events[: plain.events.index("push 2")], plain.events[plain.events.index("push 2") :]
    assert "update actor" not in first and "update critic" in first
    assert "update actor" in rest


def test_fields_and_denominators_cover_every_sample_once(tmp_path: Path) -> None:
    plain = PlainRoles()
    run(tmp_path, plain, batch={"train_iters": 1})
    for name, fields in (
        ("actor", {"advantages", "old_log_probs", "ref_log_probs", "rollout_log_probs"}),
        ("critic", {"old_values", "returns", "rollout_log_probs"}),
    ):
        updates = [(rows, total) for role, rows, total in plain.updates if role == name]
        assert sum(len(rows) for rows, _ in updates) == 8
        for rows, total in updates:
            assert total == rows.num_targets.sum()
            assert set(rows.fields) == fields and set(rows.scalars) == {"weights"}
            assert all(len(value) == rows.num_targets.sum() for value in rows.fields.values())


def test_single_update_with_kl_in_the_loss_needs_no_pass_before_it(tmp_path: Path) -> None:
    plain = PlainRoles()
    algorithm = {"advantage_estimator": "group_norm", "use_kl_loss": True, "kl_estimator": "k3"}
    rows = run(tmp_path, plain, batch={"train_iters": 1, "global_batch_size": 8}, algorithm=algorithm)
    ((_, trained, _),) = plain.updates
    assert "old_log_probs" not in trained.fields and "ref_log_probs" in trained.fields
    assert rows[1]["rollout/logprob_diff_max"] == 0.0  # from the update's own forward pass
    assert rows[1]["kl/mean"] == 0.5  # the loss reports it


def test_samples_without_result_are_left_out_and_counted(tmp_path: Path) -> None:
    plain = PlainRoles(without_result=[(0, 0), (1, 1)])
    rows = run(tmp_path, plain, batch={"train_iters": 1})
    assert rows[1]["reward/no_result_count"] == 2
    assert sum(len(trained) for role, trained, _ in plain.updates if role == "actor") == 6
    plain = PlainRoles(without_result=[(0, 0), (1, 1)])
    run(tmp_path / "group", plain, batch={"train_iters": 1}, algorithm={"advantage_estimator": "rloo"})
    trained = [rows.input_ids[starts_of(rows.lengths)] for role, rows, _ in plain.updates if role == "actor"]
    drawn = [prompt.token_ids[0] for prompt in plain.prompts]
    assert sorted(np.concatenate(trained)) == sorted(2 * drawn[2:])  # groups 0 and 1 lost the comparison


def test_overlong_samples_leave_the_loss_and_stay_in_their_groups_baseline(tmp_path: Path) -> None:
    """Sample 0 of each group is cut: the other's advantage is its reward of 1 less the mean of the others, 0."""
    plain = PlainRoles()
    algorithm = {"advantage_estimator": "rloo", "overlong_filter": True, "init_kl_coef": 0.0}
    algorithm |= {"normalize_advantages": False}
    rows = run(tmp_path, plain, batch={"train_iters": 1}, algorithm=algorithm)
    updates = [(trained, total) for _, trained, total in plain.updates]
    assert sum(len(trained) for trained, _ in updates) == 4 and len(updates) == 1
    for trained, total in updates:
        assert total == trained.num_targets.sum(), "nor are they in the denominator"
        assert set(trained.fields["advantages"].tolist()) == {1.0}
    assert rows[1]["rollout/overlong_filtered"] == 4 and rows[1]["reward/mean"] == 0.5


def test_a_step_of_overlong_samples_alone_is_not_trained(tmp_path: Path) -> None:
    class Cut(PlainRoles):
        def rollout_of(self, prompts: Any, step: int) -> Any:
            rollout = super().rollout_of(prompts, step)
            return replace(rollout, samples=[replace(sample, finish_reason="length") for sample in rollout.samples])

    plain = Cut()
    with pytest.raises(NoSamplesError, match="and overlong_filter left others out"):
        run(tmp_path, plain, algorithm={"overlong_filter": True}, reward={"max_untrained_steps": 2})
    assert plain.updates == []


def test_overlong_penalty_is_in_what_is_trained_and_not_in_the_reported_reward(tmp_path: Path) -> None:
    """Responses have 1 to 3 of 8 tokens, and the penalty begins behind the first: -(length - 1) / 7 x 3.5."""
    plain = PlainRoles()
    algorithm = {"advantage_estimator": "reinforce", "init_kl_coef": 0.0, "normalize_advantages": False}
    algorithm |= {"overlong_buffer_len": 7, "overlong_penalty_factor": 3.5}
    rows = run(tmp_path, plain, batch={"train_iters": 1}, algorithm=algorithm)
    lengths = [1 + (group + sample + 1) % 3 for group in range(4) for sample in range(2)]
    penalties = [-(length - 1) / 2 for length in lengths]
    assert rows[1]["reward/overlong_penalty"] == pytest.approx(sum(penalties) / 8)
    assert rows[1]["reward/mean"] == 0.5
    trained = {a for _, rows, _ in plain.updates for a in rows.fields["advantages"].tolist()}
    assert trained == {number % 2 + penalty for number, penalty in enumerate(penalties)}


def test_stop_signal_saves_and_leaves_after_the_step(tmp_path: Path) -> None:
    plain = PlainRoles()
    rows = run(tmp_path, plain, stop_after=1)
    assert plain.events[-3:] == ["push 1", "evaluate", "save 1"]
    assert rows[-1]["step"] == 1
    assert plain.saved[1]["step"] == 1


def test_log_prob_budget_warns_then_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, PlainRoles(difference=0.1), batch={"train_iters": 1})  # the budget is 0.05
    assert "logprob_diff_budget=0.05" in caplog.text
    with pytest.raises(LogProbDifferenceError, match="past 10 budgets"):
        run(tmp_path / "far", PlainRoles(difference=0.6), batch={"train_iters": 1})


def test_a_resumed_run_first_brings_its_weights_to_the_engines(tmp_path: Path) -> None:
    whole = PlainRoles()
    rows = run(tmp_path, whole, logging={"save_interval": 1})
    rest = PlainRoles()
    found = run(tmp_path, rest, resume=json.loads(json.dumps(whole.saved[2])))
    assert rest.events[:2] == ["push 2", "generate 3"]
    assert found[3]["reward/mean"] == rows[3]["reward/mean"] and len(found) == 4


def test_samples_of_older_weights_are_refused(tmp_path: Path) -> None:
    class Stale(PlainRoles):
        def push(self, version: int) -> dict[str, float]:
            return super().push(min(version, 1)) | {"sync/version": float(version)}

        def generate(self, prompts: Any, *, step: int, first_place: int = 0) -> Any:
            return self.rollout_of(prompts, step)

    with pytest.raises(RuntimeError, match=r"samples of weight versions \[1\] where .* version 2"):
        run(tmp_path, Stale())


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Diverging(PlainRoles):
        def forward(self, rows: Any, shift: float) -> Any:
            if self.version == 1 and shift == 1.25:
                raise NonFiniteError("loss=nan")
            return super().forward(rows, shift)

    plain = Diverging()
    with pytest.raises(NonFiniteError):
        run(tmp_path, plain, logging={"save_interval": 1})
    assert list(plain.saved) == [1]


def test_adaptive_kl_and_reward_moments_survive_a_restart(tmp_path: Path) -> None:
    plain = PlainRoles()
    algorithm = {"kl_target": 0.1, "kl_horizon": 100, "normalize_reward": True}
    run(tmp_path, plain, algorithm=algorithm, logging={"save_interval": 1})
    config = make_config(tmp_path, algorithm=algorithm)
    state = LoopState.fresh(config.algorithm)
    state.restore(json.loads(json.dumps(plain.saved[3])))
    assert state.step == 3
    assert state.kl_controller.coef == pytest.approx(
        0.01 * (1 + 0.2 * 8 / 100) ** 3
    )  # measured 0.5, five times the target
    assert state.reward_moments.count == 24 and state.reward_moments.mean == pytest.approx(0.5)
    assert state.reward_moments.scale() == pytest.approx((0.5, 0.5))
