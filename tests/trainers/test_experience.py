"""Mini-batches as a property, whose baseline a sample gets, weights and denominators, and metrics by value."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarlhf.config.arguments import PPOConfig
from megarlhf.data.types import Sample
from megarlhf.metrics.timers import Timers
from megarlhf.trainers import summary
from megarlhf.trainers.assembly import optimizer_steps
from megarlhf.trainers.evaluation import evaluate
from megarlhf.trainers.experience import (
    Experience,
    Updates,
    make_experience,
    mini_batches,
    training_rows,
    with_result,
)
from megarlhf.trainers.roles import UpdateResult
from tests.trainers.plain_roles import PlainRoles, make_config, make_prompts


def samples_of(counts: Sequence[int]) -> list[Sample]:
    """`counts[g]` samples of prompt g, in an order that mixes the groups; lengths 1 to 3."""
    prompts, plain = make_prompts(len(counts)), PlainRoles()
    places = [(s, g) for g, count in enumerate(counts) for s in range(count)]
    return [replace(plain._sample(prompts[g], g, s, 0), reward=reward_of(g, s)) for s, g in sorted(places)]


def reward_of(group: int, sample: int) -> float:
    """Depends on the prompt and on the response, so that a mix-up of either changes a number."""
    return math.sin(3.0 * group + 1.0) + 0.25 * sample


def experience_of(samples: list[Sample], **values: Any) -> Experience:
    """An experience whose per-token numbers name the sample they belong to."""

    def column(offset: float) -> list[torch.Tensor]:
        return [torch.full((len(s.response_ids),), float(offset + i)) for i, s in enumerate(samples)]

    known = {"log_probs": column(100), "ref_log_probs": column(200), "values": column(300), "kl": None}
    return Experience(samples=samples, advantages=column(400), returns=column(500), **(known | values))


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=9),
    per_step=st.integers(1, 4),
    epochs=st.integers(1, 3),
    step=st.integers(1, 50),
)
def test_every_sample_comes_once_an_epoch_and_groups_stay_whole(
    counts: list[int], per_step: int, epochs: int, step: int
) -> None:
    config = make_config(
        Path("unused"),
        batch={
            **{"n_samples_per_prompt": 5, "global_batch_size": 5 * per_step, "max_epochs": epochs},
            "rollout_batch_size": 12,
        },
    )
    experience = experience_of(samples_of(counts))
    batches = list(mini_batches(experience, config, step=step))
    drawn = [index for batch in batches for index in batch]
    assert sorted(drawn) == sorted(list(range(len(experience.samples))) * epochs)
    per_epoch = len(batches) // epochs
    assert len(batches) == per_epoch * epochs
    assert 1 <= per_epoch <= max(1, round(sum(counts) / (5 * per_step)))
    for number, batch in enumerate(batches):
        groups = {experience.samples[index].group_id for index in batch}
        assert len(batch) == sum(counts[group] for group in groups), "a group is cut"
        again = batches[(number // per_epoch) * per_epoch : (number // per_epoch + 1) * per_epoch]
        assert sum(index in other for other in again for index in batch) == len(batch)
    assert batches == list(mini_batches(experience, config, step=step))


def test_the_order_changes_with_the_step_the_epoch_and_the_seed() -> None:
    batch = {"rollout_batch_size": 12, "n_samples_per_prompt": 2, "global_batch_size": 4, "max_epochs": 2}
    config = make_config(Path("unused"), batch=batch)
    experience = experience_of(samples_of([2] * 12))

    def order(step: int, config: PPOConfig = config) -> list[list[int]]:
        return list(mini_batches(experience, config, step=step))

    assert order(1) != order(2)
    assert order(1)[:6] != order(1)[6:]
    assert order(1) != order(1, replace(config, model=replace(config.model, seed=43)))


def test_samples_without_a_group_of_whole_batches_are_dealt_one_by_one() -> None:
    config = make_config(Path("unused"), batch={"n_samples_per_prompt": 2, "global_batch_size": 3, "max_epochs": 1})
    experience = experience_of(samples_of([2, 2, 2]))
    assert sorted(map(len, mini_batches(experience, config, step=1))) == [3, 3]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("rloo", lambda own, others: own - sum(others) / len(others)),
        ("dr_grpo", lambda own, others: own - (own + sum(others)) / (1 + len(others))),
    ],
)
def test_the_baseline_is_of_the_samples_of_the_same_prompt(estimator: str, expected: Any) -> None:
    options = {"advantage_estimator": estimator, "normalize_advantages": False, "init_kl_coef": 0.0}
    config = make_config(Path("unused"), algorithm=options)
    plain, samples = PlainRoles(), samples_of([3, 2, 4])
    plain.phase = "train"
    experience = make_experience(samples, plain.roles(critic=False).actor, None, config, kl_coef=0.0)
    for index, sample in enumerate(samples):
        others = [other.reward for other in samples if other.prompt.text == sample.prompt.text and other is not sample]
        wanted = expected(sample.reward, others)
        torch.testing.assert_close(
            experience.advantages[index], torch.full((len(sample.response_ids),), float(wanted)), msg=str(index)
        )


def test_normalized_rewards_are_shifted_and_scaled_before_they_are_clipped() -> None:
    options = {"advantage_estimator": "reinforce", "normalize_advantages": False, "init_kl_coef": 0.0}
    config = make_config(Path("unused"), algorithm=options | {"reward_clip_range": (-0.5, 0.75)})
    plain = PlainRoles()
    plain.phase = "train"
    samples = [replace(s, reward=r) for s, r in zip(samples_of([3]), (4.0, 6.5, 5.0), strict=True)]
    actor = plain.roles(critic=False).actor
    experience = make_experience(samples, actor, None, config, kl_coef=0.0, reward_scale=(5.0, 2.0))
    assert [float(a[-1]) for a in experience.advantages] == [-0.5, 0.75, 0.0]  # (r - 5) / 2, clipped


@pytest.mark.parametrize(
    ("algorithm", "critic", "weights", "denominator"),
    [
        ({"loss_aggregation": "token", "critic_loss_aggregation": "sequence"}, False, (1.0, 1.0), 4.0),
        ({"loss_aggregation": "token", "critic_loss_aggregation": "sequence"}, True, (1 / 3, 1.0), 2.0),
        ({"loss_aggregation": "sequence", "critic_loss_aggregation": "token"}, False, (1 / 3, 1.0), 2.0),
        ({"loss_aggregation": "sequence", "critic_loss_aggregation": "token"}, True, (1.0, 1.0), 4.0),
        ({"advantage_estimator": "dr_grpo"}, False, (1.0, 1.0), 16.0),  # generate_max_len=8, two samples
    ],
)
def test_weights_denominators_and_fields_of_an_update(
    algorithm: dict[str, Any], critic: bool, weights: tuple[float, float], denominator: float
) -> None:
    config = make_config(Path("unused"), algorithm=algorithm)
    samples = samples_of([4])  # of 1, 2, 3 and 1 tokens
    rows, total = training_rows(experience_of(samples), [2, 0], config, critic=critic)
    assert total == denominator
    assert [float(row.fields["weights"][0]) for row in rows] == pytest.approx(weights)
    assert [len(row.fields["weights"]) for row in rows] == [3, 1]
    names = {"old_values": 300, "returns": 500} if critic else {"advantages": 400, "old_log_probs": 100}
    for name, offset in names.items():
        assert [float(row.fields[name][0]) for row in rows] == [offset + 2, offset], name
    assert [row.input_ids for row in rows] == [(*samples[i].prompt.token_ids, *samples[i].response_ids) for i in (2, 0)]


def test_group_estimators_need_a_second_result_in_the_group() -> None:
    samples = [replace(s, reward=None) if (s.group_id, s.sample_id) == (1, 0) else s for s in samples_of([2, 2, 1])]
    places = [(s.group_id, s.sample_id) for s in with_result(samples, estimator="rloo")]
    assert places == [(0, 0), (0, 1)]
    places = [(s.group_id, s.sample_id) for s in with_result(samples, estimator="gae")]
    assert places == [(0, 0), (2, 0), (0, 1), (1, 1)]


def test_evaluation_counts_correct_answers_among_those_with_a_result() -> None:
    class Judged(PlainRoles):
        def score(self, samples: Sequence[Sample]) -> list[Sample]:
            rewards = [1.0, 0.99, None, 1.5, 0.0]
            return [replace(s, reward=r) for s, r in zip(samples, rewards, strict=True)]

    plain, prompts = Judged(), make_prompts(5)
    metrics = evaluate(plain.roles(critic=False), prompts, Timers())
    lengths = [len(plain._sample(p, g, 0, 0).response_ids) for g, p in enumerate(prompts)]
    assert metrics == {
        "eval/accuracy": 2 / 4,
        "eval/no_result_count": 1.0,
        "eval/response_length_mean": sum(lengths) / 5,
    }
    assert lengths == [1, 2, 3, 1, 2]


def test_metrics_of_samples_and_training_by_value() -> None:
    scored = samples_of([3, 2])
    scored[1] = replace(scored[1], reward=None)
    usable = [s for s in scored if s.reward is not None]
    metrics = summary.sample_metrics(scored, usable)
    rewards = [float(s.reward) for s in usable if s.reward is not None]
    mean = sum(rewards) / 4
    assert metrics == pytest.approx(
        {
            "reward/mean": mean,
            "reward/std": math.sqrt(sum((r - mean) ** 2 for r in rewards) / 4),
            "reward/no_result_count": 1.0,
            "rollout/response_length_mean": sum(len(s.response_ids) for s in scored) / 5,
            "rollout/response_length_max": 3.0,
            "rollout/prompt_length_mean": 2.0,
            "rollout/truncated_frac": 2 / 5,  # sample 0 of either group
        }
    )
    advantages = [torch.tensor([1.0, 3.0]), torch.tensor([-2.0])]
    returns, values = [torch.tensor([2.0, 0.0]), torch.tensor([4.0])], [torch.tensor([1.5, 0.5]), torch.tensor([3.0])]
    kl = [torch.tensor([0.25, 0.5]), torch.tensor([0.0])]
    experience = experience_of(scored[:2], values=values, kl=kl)
    experience = replace(experience, advantages=advantages, returns=returns)

    def result(loss: float, norm: float, rate: float, frac: float) -> UpdateResult:
        return UpdateResult(loss=loss, metrics={"clip_frac": frac}, grad_norm=norm, learning_rate=rate, outputs=[])

    updates = Updates(
        actor=[result(1.0, 2.0, 0.1, 0.25), result(2.0, 4.0, 0.05, 0.75)], critic=[result(6.0, 8.0, 0.2, 0.5)]
    )
    assert summary.training_metrics(experience, updates) == pytest.approx(
        {
            "advantage/mean": 2 / 3,
            "advantage/std": math.sqrt(((1 / 3) ** 2 + (7 / 3) ** 2 + (8 / 3) ** 2) / 3),
            "return/mean": 2.0,
            "kl/mean": 0.25,
            "policy/loss": 1.5,
            "policy/clip_frac": 0.5,
            "policy/grad_norm": 3.0,
            "policy/learning_rate": 0.05,
            "critic/loss": 6.0,
            "critic/clip_frac": 0.5,
            "critic/grad_norm": 8.0,
            "critic/learning_rate": 0.2,
            "critic/explained_variance": 1 - _variance([0.5, -0.5, 1.0]) / _variance([2.0, 0.0, 4.0]),
        }
    )


def test_metrics_that_overflow_do_not_end_the_step() -> None:
    def result(ratio: float) -> UpdateResult:
        return UpdateResult(loss=1e308, metrics={"ratio_mean": ratio}, grad_norm=1.0, learning_rate=0.1, outputs=[])

    updates = Updates(actor=[result(math.inf), result(-math.inf)])
    metrics = summary.training_metrics(experience_of(samples_of([2])), updates)
    assert math.isnan(metrics["policy/ratio_mean"]) and metrics["policy/loss"] == math.inf


def _variance(numbers: list[float]) -> float:
    mean = sum(numbers) / len(numbers)
    return sum((n - mean) ** 2 for n in numbers) / len(numbers)


def test_log_prob_differences_are_of_the_same_tokens(caplog: pytest.LogCaptureFixture) -> None:
    samples = [
        replace(s, rollout_log_probs=tuple(-0.1 * k for k in range(len(s.response_ids)))) for s in samples_of([3])
    ]
    trainer = [torch.tensor(s.rollout_log_probs) + shift for s, shift in zip(samples, (0.02, -0.04, 0.0), strict=True)]
    metrics = summary.check_log_prob_difference(samples, trainer, 0.05)
    assert metrics == pytest.approx(
        {"rollout/logprob_diff_max": 0.04, "rollout/logprob_diff_mean": (0.02 + 2 * 0.04) / 6}
    )
    assert not caplog.text
    summary.check_log_prob_difference(samples, trainer, 0.03)
    assert "logprob_diff_max=0.04 is past logprob_diff_budget=0.03" in caplog.text
    for bad in (0.0039, 0.5):
        trainer[1][0] = math.nan if bad == 0.5 else trainer[1][0]
        with pytest.raises(summary.LogProbDifferenceError):
            summary.check_log_prob_difference(samples, trainer, bad)


def test_optimizer_steps_of_the_whole_run_leave_out_frozen_ones() -> None:
    batch = {"train_iters": 7, "max_epochs": 3}  # 8 samples a step in optimizer steps of 4: 2 an epoch
    config = make_config(Path("unused"), batch=batch, freezing_actor_steps=2)
    assert optimizer_steps(config, "actor") == (7 - 2) * 6
    assert optimizer_steps(config, "critic") == 7 * 6
    assert optimizer_steps(make_config(Path("unused"), batch=batch), "actor") == 7 * 6


def test_speed_is_over_response_tokens() -> None:
    assert summary.speed(samples_of([3, 1]), seconds=4.0) == {
        "perf/tokens_per_second": (1 + 2 + 3 + 2) / 4.0,
        "perf/samples_per_second": 1.0,
        "time/step_seconds": 4.0,
    }
