"""Advantages against hand-worked numbers and loops that follow the definitions term by term."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.algos.advantages import (
    AdvantageResult,
    compute_advantages,
    discounted_returns,
    gae,
    group_relative_advantages,
    rloo_advantages,
    token_rewards,
    whiten,
)

REWARDS = torch.tensor([1.0, 4.0, 0.0, 6.0, 2.0])
GROUP_IDS = torch.tensor([7, 2, 7, 2, 7])  # group 7: 1, 0, 2; group 2: 4, 6
LENGTHS = [2, 1, 3, 2, 1]
SIZES = torch.tensor(LENGTHS)
KL = [torch.tensor([0.5, -0.1]), torch.tensor([0.2]), torch.tensor([0.1, 0.0, 0.3]), torch.zeros(2), torch.ones(1)]
VALUES = [torch.linspace(-1, 1, length) for length in LENGTHS]


def compute(estimator: str, **changes: Any) -> AdvantageResult:
    arguments = {
        "rewards": REWARDS,
        "group_ids": GROUP_IDS,
        "kl": torch.cat(KL),
        "lengths": SIZES,
        "values": torch.cat(VALUES) if estimator == "gae" else None,
        "kl_coef": 0.1,
        "gamma": 1.0,
        "lambd": 0.9,
        "clip_range": (-5.0, 5.0),
        "normalize": False,
    }
    return compute_advantages(estimator, **(arguments | changes))  # type: ignore[arg-type]


def assert_ragged_close(actual: Tensor, expected: Sequence[Sequence[float]]) -> None:
    assert actual.dtype == torch.float32
    assert actual.tolist() == pytest.approx([x for row in expected for x in row], abs=1e-5)


def one(*numbers: float) -> tuple[Tensor, Tensor]:
    """The numbers of one response, and its length."""
    return torch.tensor(numbers), torch.tensor([len(numbers)])


def slow_returns(outcomes: Sequence[float], *, gamma: float, kl_coef: float) -> list[list[float]]:
    """sum_k gamma^k (-kl_coef * kl_{t+k}), and gamma^(last - t) of the outcome."""
    rows = []
    for outcome, kl, length in zip(outcomes, KL, LENGTHS, strict=True):
        reward = [-kl_coef * kl[t].item() + (outcome if t == length - 1 else 0.0) for t in range(length)]
        rows.append([sum(gamma ** (s - t) * reward[s] for s in range(t, length)) for t in range(length)])
    return rows


def test_token_rewards_by_hand() -> None:
    kl, lengths = torch.cat(KL[:2]), torch.tensor([2, 1])
    tokens = token_rewards(kl, torch.tensor([2.0, -10.0]), lengths, kl_coef=0.1)
    assert_ragged_close(tokens, [[-0.05, 2.01], [-10.02]])


def test_token_rewards_leave_inputs_alone_and_skip_a_kl_of_weight_zero() -> None:
    kl, lengths = one(float("inf"), 1.0)
    assert_ragged_close(token_rewards(kl, torch.tensor([2.0]), lengths, kl_coef=0.0), [[0.0, 2.0]])
    token_rewards(kl, torch.tensor([2.0]), lengths, kl_coef=1.0)
    assert kl.tolist() == [float("inf"), 1.0]
    rewards = token_rewards(None, torch.tensor([20.0]), torch.tensor([3]), kl_coef=1.0)
    assert_ragged_close(rewards, [[0.0, 0.0, 20.0]])


def test_gae_by_hand() -> None:
    # deltas: 0.9 * 0.4 - 0.5 = -0.14, 0.9 * 0.6 - 0.4 = 0.14, 1 - 0.6 = 0.4; gamma * lambda = 0.72
    rewards, lengths = one(0.0, 0.0, 1.0)
    advantages, returns = gae(rewards, torch.tensor([0.5, 0.4, 0.6]), lengths, gamma=0.9, lambd=0.8)
    assert advantages.tolist() == pytest.approx([0.16816, 0.428, 0.4])
    assert returns.tolist() == pytest.approx([0.66816, 0.828, 1.0])


@pytest.mark.parametrize("numbers", [8, 40, 1 << 22])
def test_gae_matches_its_definition_response_by_response(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of one, of some and of all responses."""
    monkeypatch.setattr("megarlhf.algos.advantages._SCAN_NUMBERS", numbers)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([17, 1, 33, 70, 2, 64])  # runs are of 32 tokens
    rewards, values = (torch.randn(int(lengths.sum()), generator=generator) for _ in range(2))
    gamma, lambd = 0.97, 0.8
    expected: list[float] = []
    for r, v in zip(rewards.split(lengths.tolist()), values.split(lengths.tolist()), strict=True):
        later = [*v.tolist()[1:], 0.0]
        deltas = [r[t].item() + gamma * later[t] - v[t].item() for t in range(len(r))]
        expected += [sum((gamma * lambd) ** (s - t) * deltas[s] for s in range(t, len(r))) for t in range(len(r))]
    advantages, returns = gae(rewards, values, lengths, gamma=gamma, lambd=lambd)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(returns - values, advantages)


def test_gae_with_lambda_one_returns_the_reward_to_go_whatever_the_values() -> None:
    rewards, lengths = one(1.0, 2.0, 4.0)
    _, returns = gae(rewards, torch.randn(3), lengths, gamma=0.5, lambd=1.0)
    assert returns.tolist() == pytest.approx(discounted_returns(rewards, lengths, gamma=0.5).tolist(), abs=1e-6)


def test_advantages_hold_no_gradient() -> None:
    result = compute("gae", values=torch.cat(VALUES).requires_grad_())
    assert not result.advantages.requires_grad and not result.returns.requires_grad


def test_discounted_returns_by_hand() -> None:
    rewards, lengths = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([3, 2])
    assert discounted_returns(rewards, lengths, gamma=0.5).tolist() == [3.0, 4.0, 4.0, 16.0, 16.0]
    assert discounted_returns(rewards, lengths, gamma=0.0).tolist() == rewards.tolist()


def test_group_baselines_by_hand_in_any_order_and_size() -> None:
    assert rloo_advantages(REWARDS, GROUP_IDS).tolist() == [0.0, -2.0, -1.5, 2.0, 1.5]
    centred = group_relative_advantages(REWARDS, GROUP_IDS, divide_by_std=False, eps=0.0)
    assert centred.tolist() == [0.0, -1.0, -1.0, 1.0, 1.0]
    # sample std: 1 in group 7, sqrt(2) in group 2
    scaled = group_relative_advantages(REWARDS, GROUP_IDS, divide_by_std=True, eps=0.0)
    assert scaled.tolist() == pytest.approx([0.0, -(0.5**0.5), -1.0, 0.5**0.5, 1.0])


def test_group_baselines_match_loops() -> None:
    torch.manual_seed(0)
    rewards, ids = torch.randn(40) * 3, torch.randint(5, (40,))
    for i in range(40):
        others = [rewards[j].item() for j in range(40) if j != i and ids[j] == ids[i]]
        own = rewards[i].item()
        group = [*others, own]
        centred = own - statistics.fmean(group)
        assert rloo_advantages(rewards, ids)[i].item() == pytest.approx(own - statistics.fmean(others), abs=1e-5)
        mean = group_relative_advantages(rewards, ids, divide_by_std=False)[i].item()
        assert mean == pytest.approx(centred, abs=1e-5)
        grpo = group_relative_advantages(rewards, ids, divide_by_std=True, eps=0.01)[i].item()
        assert grpo == pytest.approx(centred / (statistics.stdev(group) + 0.01), abs=1e-5)


def test_equal_rewards_give_zero_and_not_scaled_rounding() -> None:
    rewards = torch.full((7,), 8.1)
    advantages = group_relative_advantages(rewards, torch.zeros(7, dtype=torch.int64), divide_by_std=True, eps=1e-6)
    assert advantages.abs().max() < 1e-6


@pytest.mark.parametrize(
    "baseline",
    [
        rloo_advantages,
        lambda r, g: group_relative_advantages(r, g, divide_by_std=True, eps=1.0),
        lambda r, g: group_relative_advantages(r, g, divide_by_std=False, eps=1.0),
    ],
)
def test_group_of_one_is_refused(baseline: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="group_id=4 has 1 sample.*n_samples_per_prompt"):
        baseline(torch.ones(3), torch.tensor([3, 4, 3]))


@pytest.mark.parametrize(
    ("estimator", "outcomes"),
    [
        ("reinforce", [1.0, 4.0, 0.0, 5.0, 2.0]),  # 6 is clamped to 5, before any baseline
        ("reinforce_baseline", [0.0, -0.5, -1.0, 0.5, 1.0]),
        ("rloo", [0.0, -1.0, -1.5, 1.0, 1.5]),
    ],
)
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_reinforce_family_discounts_the_outcome_and_the_kl(estimator: str, outcomes: list[float], gamma: float) -> None:
    result = compute(estimator, gamma=gamma)
    assert_ragged_close(result.advantages, slow_returns(outcomes, gamma=gamma, kl_coef=0.1))
    assert_ragged_close(result.returns, slow_returns(outcomes, gamma=gamma, kl_coef=0.1))


@pytest.mark.parametrize(
    ("estimator", "outcomes"),
    [("group_norm", [0.0, -(0.5**0.5), -1.0, 0.5**0.5, 1.0]), ("dr_grpo", [0.0, -0.5, -1.0, 0.5, 1.0])],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_grpo_family_broadcasts_the_outcome_and_is_never_whitened(
    estimator: str, outcomes: list[float], normalize: bool
) -> None:
    without_kl = compute(estimator, gamma=0.5, kl_coef=0.0, normalize=normalize)
    assert_ragged_close(without_kl.advantages, [[a] * n for a, n in zip(outcomes, LENGTHS, strict=True)])
    penalties = slow_returns([0.0] * 5, gamma=0.5, kl_coef=0.1)
    with_kl = compute(estimator, gamma=0.5, normalize=normalize)
    assert_ragged_close(with_kl.advantages, [[p + a for p in row] for a, row in zip(outcomes, penalties, strict=True)])


@pytest.mark.parametrize("estimator", ["gae", "reinforce", "reinforce_baseline", "rloo"])
def test_normalize_whitens_advantages_and_leaves_returns(estimator: str) -> None:
    plain, normalized = compute(estimator), compute(estimator, normalize=True)
    tokens = plain.advantages.tolist()
    mean, std = statistics.fmean(tokens), statistics.pstdev(tokens)
    assert_ragged_close(normalized.advantages, [[(x - mean) / std for x in tokens]])
    assert_ragged_close(normalized.returns, [plain.returns.tolist()])


@pytest.mark.parametrize("block", [1, 3, 4])
@pytest.mark.parametrize("estimator", ["gae", "rloo", "group_norm"])
def test_blocks_of_samples_change_nothing(estimator: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compute(estimator, gamma=0.9, normalize=True)
    monkeypatch.setattr("megarlhf.algos.advantages._BLOCK_TOKENS", block)
    parts = compute(estimator, gamma=0.9, normalize=True)
    assert parts.advantages.tolist() == whole.advantages.tolist() and parts.returns.tolist() == whole.returns.tolist()


def test_gae_estimator_uses_values_per_sample() -> None:
    result = compute("gae", gamma=0.9)
    rewards = token_rewards(torch.cat(KL), REWARDS.clamp(-5.0, 5.0), SIZES, kl_coef=0.1).split(LENGTHS)
    for i, (reward, value) in enumerate(zip(rewards, VALUES, strict=True)):
        advantages, returns = gae(reward, value, SIZES[i : i + 1], gamma=0.9, lambd=0.9)
        assert result.advantages.split(LENGTHS)[i].tolist() == advantages.tolist()
        assert result.returns.split(LENGTHS)[i].tolist() == returns.tolist()


def test_rewards_of_untrained_samples_count_in_baselines_alone() -> None:
    """Groups of rewards 1, 4, 4.5 and 2, 4, of which the 4 of the first and the 2 of the second are trained."""
    trained = torch.tensor([False, True, False, True, False])
    found = compute(
        "reinforce_baseline",
        rewards=torch.tensor([1.0, 4.0, 4.5, 2.0, 4.0]),
        group_ids=torch.tensor([0, 0, 0, 1, 1]),
        lengths=torch.tensor([2, 3]),
        kl=torch.tensor([0.5, 0.0, 0.0, 0.0, 1.0]),
        values=None,
        kl_coef=0.1,
        gamma=1.0,
        normalize=False,
        trained=trained,
    )
    first, second = 4.0 - 9.5 / 3, 2.0 - 3.0
    assert_ragged_close(found.advantages, [[first - 0.05, first], [second - 0.1] * 3])


def test_no_kl_is_a_kl_of_weight_zero() -> None:
    result = compute("rloo", kl=None, gamma=0.9)
    assert_ragged_close(result.advantages, [compute("rloo", gamma=0.9, kl_coef=0.0).advantages.tolist()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": torch.tensor([1.0, float("nan"), 0.0, 6.0, float("inf")])}, "reward=nan for 2 of 5 samples"),
        ({"lengths": torch.tensor([2, 0, 4, 2, 1])}, "response_length=0 for sample 1"),
    ],
)
def test_compute_advantages_refuses(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute("rloo", **changes)


@pytest.mark.parametrize(
    ("estimator", "changes"),
    [
        ("gae", {"values": None}),
        ("rloo", {"values": torch.cat(VALUES)}),
        ("gae", {"values": torch.cat(VALUES)[:1]}),  # would broadcast
        ("rloo", {"kl": torch.ones(1)}),
    ],
)
def test_values_and_kl_that_do_not_fit_are_a_bug(estimator: str, changes: dict[str, Tensor | None]) -> None:
    with pytest.raises(AssertionError):
        compute(estimator, **changes)


def test_whitening_by_hand() -> None:
    # mean 3, variance (4 + 0 + 4) / 3
    assert whiten(torch.tensor([1.0, 3.0, 5.0]), eps=0.0).tolist() == pytest.approx(
        [-math.sqrt(1.5), 0, math.sqrt(1.5)]
    )


def test_whitening_matches_the_statistics_module() -> None:
    values = torch.randn(15, generator=torch.Generator().manual_seed(0)) * 7 + 100
    mean, variance = statistics.fmean(values.tolist()), statistics.pvariance(values.tolist())
    whitened = whiten(values, eps=0.1)
    expected = [(x - mean) / math.sqrt(variance + 0.1) for x in values.tolist()]
    assert whitened.tolist() == pytest.approx(expected, abs=1e-6) and whitened.dtype == torch.float32


def test_a_constant_batch_becomes_zero() -> None:
    assert whiten(torch.full((3001,), 8.1), eps=1e-8).abs().max() < 1e-9
