"""Mini-batches as a property, whose baseline a sample gets, weights and denominators, and metrics by value."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.lora import LoraArguments
from megarlhf.config.roles import ROLES
from megarlhf.data.types import Rollout, Sample
from megarlhf.trainers import precision, summary
from megarlhf.trainers.assembly import optimizer_steps
from megarlhf.trainers.experience import (
    Experience,
    Updates,
    loss_weights,
    make_experience,
    passes_of,
    split_mini_batches,
    update_order,
    with_result,
)
from megarlhf.trainers.roles import LogProbDifference, UpdateResult
from tests.trainers.plain_roles import PlainRoles, make_config, make_prompts, tokens_of


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

    def column(offset: float) -> torch.Tensor:
        return torch.cat([torch.full((s.response_length,), float(offset + i)) for i, s in enumerate(samples)])

    known = {"values": column(300).numpy(), "kl": None, "difference": None, "has_reference": True}
    known |= {"actor_denominators": [], "critic_denominators": []}
    return Experience(advantages=column(400), returns=column(500), **(known | values))


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
    samples = samples_of(counts)
    mini_batches = split_mini_batches(samples, config, step=step)
    assert sorted(index for mini_batch in mini_batches for index in mini_batch) == list(range(len(samples)))
    assert 1 <= len(mini_batches) <= max(1, round(sum(counts) / (5 * per_step)))
    for mini_batch in mini_batches:
        groups = {samples[index].group_id for index in mini_batch}
        assert len(mini_batch) == sum(counts[group] for group in groups), "a group is cut"
    assert mini_batches == split_mini_batches(samples, config, step=step)
    order, count = update_order(len(mini_batches), config, step=step), len(mini_batches)
    assert order[:count] == list(range(count))
    for epoch in range(epochs):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert len(order) == epochs * count and order == update_order(count, config, step=step)


def test_the_order_changes_with_the_step_the_epoch_and_the_seed() -> None:
    batch = {"rollout_batch_size": 12, "n_samples_per_prompt": 2, "global_batch_size": 4, "max_epochs": 3}
    config = make_config(Path("unused"), batch=batch)
    other, samples = replace(config, model=replace(config.model, seed=43)), samples_of([2] * 12)
    mini_batches = [split_mini_batches(samples, c, step=step) for c, step in ((config, 1), (config, 2), (other, 1))]
    assert mini_batches[0] != mini_batches[1] and mini_batches[0] != mini_batches[2] and len(mini_batches[0]) == 6
    orders = [update_order(6, c, step=step)[6:] for c, step in ((config, 1), (config, 2), (other, 1))]
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[0][:6] != orders[0][6:]


def test_samples_without_a_group_of_whole_batches_go_one_by_one() -> None:
    config = make_config(Path("unused"), batch={"n_samples_per_prompt": 2, "global_batch_size": 3, "max_epochs": 1})
    assert sorted(map(len, split_mini_batches(samples_of([2, 2, 2]), config, step=1))) == [3, 3]


def experience_from(samples: list[Sample], config: PPOConfig, **options: Any) -> Experience:
    """Of these samples, without a critic."""
    plain, rollout = PlainRoles(), Rollout(samples=samples, tokens=tokens_of(samples))
    plain.phase = "train"
    roles = plain.roles(critic=False)
    passes = passes_of(rollout, roles, config, step=1)
    return make_experience(passes, samples, roles, config, kl_coef=0.0, **options)


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
    samples = samples_of([3, 2, 4])
    lengths = [sample.response_length for sample in samples]
    advantages = experience_from(samples, config).advantages.split(lengths)
    for index, sample in enumerate(samples):
        others = [other.reward for other in samples if other.prompt.text == sample.prompt.text and other is not sample]
        wanted = expected(sample.reward, others)
        torch.testing.assert_close(
            advantages[index], torch.full((sample.response_length,), float(wanted)), msg=str(index)
        )


def test_normalized_rewards_are_shifted_and_scaled_before_they_are_clipped() -> None:
    options = {"advantage_estimator": "reinforce", "normalize_advantages": False, "init_kl_coef": 0.0}
    config = make_config(Path("unused"), algorithm=options | {"reward_clip_range": (-0.5, 0.75)})
    samples = [replace(s, reward=r) for s, r in zip(samples_of([3]), (4.0, 6.5, 5.0), strict=True)]
    experience = experience_from(samples, config, reward_scale=(5.0, 2.0))  # of 1, 2 and 3 tokens
    assert experience.advantages[[0, 2, 5]].tolist() == [-0.5, 0.75, 0.0]  # (r - 5) / 2, clipped


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
def test_weights_and_denominator_of_an_update(
    algorithm: dict[str, Any], critic: bool, weights: tuple[float, float], denominator: float
) -> None:
    config = make_config(Path("unused"), algorithm=algorithm)
    found, totals = loss_weights(torch.tensor([3, 1]), [[1, 0], [0], [1]], config, critic=critic)
    assert totals[0] == totals[1] + totals[2] == denominator and found.tolist() == pytest.approx(weights)


def test_each_role_is_given_what_its_loss_asks_for_of_the_same_samples() -> None:
    options = {"advantage_estimator": "gae", "loss_aggregation": "sequence", "critic_loss_aggregation": "token"}
    sizes = {"global_batch_size": 2}
    config = make_config(Path("unused"), batch=sizes, algorithm=options | {"normalize_advantages": False})
    plain, samples = PlainRoles(), samples_of([3, 2])
    plain.phase, roles = "train", plain.roles(critic=True)
    rollout = Rollout(samples=samples, tokens=tokens_of(samples))
    assert roles.critic is not None
    experience = make_experience(passes_of(rollout, roles, config, step=1), samples, roles, config, kl_coef=0.25)
    mini_batches = split_mini_batches(samples, config, step=1)
    assert experience.actor_denominators == [len(mini_batch) for mini_batch in mini_batches]
    tokens = [sum(samples[i].response_length for i in mini_batch) for mini_batch in mini_batches]
    assert experience.critic_denominators == tokens
    assert sorted(sum(mini_batches, [])) == [0, 1, 2, 3, 4]
    lengths = [sample.response_length for sample in samples]
    advantages, returns = experience.advantages.split(lengths), experience.returns.split(lengths)
    for number, mini_batch in enumerate(mini_batches):
        roles.actor.update(number, denominator=1.0)
        roles.critic.update(number, denominator=1.0)
        (_, actor_rows, _), (_, critic_rows, _) = plain.updates[-2:]
        order = sorted(mini_batch)
        for rows in (actor_rows, critic_rows):
            ids = [[*samples[i].prompt.token_ids, *range(20, 20 + lengths[i])] for i in order]
            assert rows.input_ids.tolist() == sum(ids, [])
        assert actor_rows.fields["advantages"].tolist() == torch.cat([advantages[i] for i in order]).tolist()
        assert critic_rows.fields["returns"].tolist() == torch.cat([returns[i] for i in order]).tolist()
        assert actor_rows.scalars["weights"].tolist() == pytest.approx([1 / lengths[i] for i in order])
        assert critic_rows.scalars["weights"].tolist() == [1.0] * len(order)
    # k1 of -1 against -1.5 at 0.25 a nat, values of 0.25 everywhere, lambda 0.95, gamma 1: by hand for one token
    single = lengths.index(1)
    assert advantages[single].tolist() == pytest.approx([samples[single].reward - 0.25 * 0.5 - 0.25])
    assert returns[single].tolist() == pytest.approx([samples[single].reward - 0.25 * 0.5])


def test_group_estimators_need_a_second_result_in_the_group() -> None:
    samples = [replace(s, reward=None) if (s.group_id, s.sample_id) == (1, 0) else s for s in samples_of([2, 2, 1])]
    places = [(s.group_id, s.sample_id) for s in with_result(samples, estimator="rloo")]
    assert places == [(0, 0), (0, 1)]
    places = [(s.group_id, s.sample_id) for s in with_result(samples, estimator="gae")]
    assert places == [(0, 0), (2, 0), (0, 1), (1, 1)]


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
            "rollout/response_length_mean": sum(s.response_length for s in scored) / 5,
            "rollout/response_length_max": 3.0,
            "rollout/prompt_length_mean": 2.0,
            "rollout/truncated_frac": 2 / 5,  # sample 0 of either group
        }
    )
    advantages, returns = torch.tensor([1.0, 3.0, -2.0]), torch.tensor([2.0, 0.0, 4.0])
    values, kl = torch.tensor([1.5, 0.5, 3.0]).numpy(), torch.tensor([0.25, 0.5, 0.0]).numpy()
    experience = experience_of(scored[:2], values=values, kl=kl)
    experience = replace(experience, advantages=advantages, returns=returns)

    def result(loss: float, norm: float, rate: float, frac: float) -> UpdateResult:
        return UpdateResult(loss=loss, metrics={"clip_frac": frac}, grad_norm=norm, learning_rate=rate)

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
        return UpdateResult(loss=1e308, metrics={"ratio_mean": ratio}, grad_norm=1.0, learning_rate=0.1)

    updates = Updates(actor=[result(math.inf), result(-math.inf)])
    metrics = summary.training_metrics(experience_of(samples_of([2])), updates)
    assert math.isnan(metrics["policy/ratio_mean"]) and metrics["policy/loss"] == math.inf


def _variance(numbers: list[float]) -> float:
    mean = sum(numbers) / len(numbers)
    return sum((n - mean) ** 2 for n in numbers) / len(numbers)


def check_difference(difference: LogProbDifference, *, bf16: bool = False, **budgets: Any) -> dict[str, float]:
    config = make_config(Path("unused"))
    model, rollout = replace(config.model, bf16=bf16), replace(config.rollout, **budgets)
    return precision.check_log_prob_difference(difference, replace(config, model=model, rollout=rollout))


def test_log_prob_differences_add_up(caplog: pytest.LogCaptureFixture) -> None:
    engine = np.array([-0.1, -0.7, -1.3], dtype=np.float32)
    first = LogProbDifference.between(engine[:1] + np.float32(0.02), engine[:1])
    both = first + LogProbDifference.between(engine[1:] - np.float32(0.04), engine[1:])
    mean, kl = (0.02 + 2 * 0.04) / 3, (math.exp(0.02) - 1.02 + 2 * (math.exp(-0.04) - 0.96)) / 3
    found = check_difference(both)
    expected = {"rollout/logprob_diff_max": 0.04, "rollout/logprob_diff_mean": mean, "rollout/logprob_kl": kl}
    assert found == pytest.approx(expected, rel=1e-4) and not caplog.text
    check_difference(both, logprob_diff_budget=0.035)  # the largest is past it, the mean is not
    assert not caplog.text
    check_difference(both, logprob_diff_budget=0.03, logprob_kl_budget=0.0005)
    assert "logprob_diff_mean=0.0333 is past logprob_diff_budget=0.03" in caplog.text
    assert "logprob_kl=0.000593 is past logprob_kl_budget=0.0005" in caplog.text
    broken = LogProbDifference.between(np.array([np.nan], dtype=np.float32), engine[:1])
    for bad, budgets in (
        (both, {"logprob_diff_budget": 0.0033}),
        (both, {"logprob_kl_budget": 0.000055}),
        (first + broken, {}),
        (broken + first, {}),
    ):
        for bf16 in (False, True):
            with pytest.raises(precision.LogProbDifferenceError, match="past 10 budgets"):
                check_difference(bad, bf16=bf16, **budgets)


def test_one_far_token_of_many_stops_in_float32_alone() -> None:
    """In bfloat16 there is one past a nat among some 10^7 tokens, while mean and KL are as always."""
    engine = np.full(10**5, -1.0, dtype=np.float32)
    trainer = engine + np.float32(0.01)
    trainer[7] = 0.0
    far = LogProbDifference.between(trainer, engine)
    assert check_difference(far, bf16=True)["rollout/logprob_diff_max"] == pytest.approx(1.0)
    with pytest.raises(precision.LogProbDifferenceError, match="logprob_diff_max=1 is past logprob_diff_budget=0.05"):
        check_difference(far)


@pytest.mark.parametrize(("dropout", "own_pass"), [(0.0, False), (0.25, True)])
def test_log_probs_are_compared_with_the_engines_without_dropout(dropout: float, own_pass: bool) -> None:
    """One update of every sample would give them, but a forward pass with dropout is of another policy."""
    algorithm = {"advantage_estimator": "reinforce", "init_kl_coef": 0.0}
    config = make_config(Path("unused"), batch={"global_batch_size": 8}, algorithm=algorithm)
    config = replace(config, lora=LoraArguments(lora_rank=2, lora_dropout=dropout))
    assert config.batch.updates_per_step == 1
    assert (experience_from(samples_of([3, 2]), config).difference is not None) == own_pass


def test_the_kl_is_of_the_policy_that_sampled() -> None:
    """Each of two tokens as often as the engine samples it: the mean of the estimates is the KL itself."""
    engine, trainer = np.log(np.array([0.25, 0.75])), np.log(np.array([0.5, 0.5]))
    drawn = np.array([0, 1, 1, 1])
    found = LogProbDifference.between(trainer[drawn], engine[drawn])
    assert found.kl / found.num_tokens == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert LogProbDifference.between(np.array([-np.inf]), np.array([-1.0])).kl == np.inf


def test_optimizer_steps_of_the_whole_run_leave_out_frozen_ones() -> None:
    batch = {"train_iters": 7, "max_epochs": 3}  # 8 samples a step in optimizer steps of 4: 2 an epoch
    config = make_config(Path("unused"), batch=batch, freezing_actor_steps=2)
    assert optimizer_steps(config, ROLES["actor"]) == (7 - 2) * 6
    assert optimizer_steps(config, ROLES["critic"]) == 7 * 6
    assert optimizer_steps(make_config(Path("unused"), batch=batch), ROLES["actor"]) == 7 * 6


def test_speed_is_over_response_tokens() -> None:
    assert summary.speed(samples_of([3, 1]), seconds=4.0) == {
        "perf/tokens_per_second": (1 + 2 + 3 + 2) / 4.0,
        "perf/samples_per_second": 1.0,
        "time/step_seconds": 4.0,
    }
