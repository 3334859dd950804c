"""Losses against hand-worked numbers, a scalar loop, finite differences, and every split of a batch."""

import math
import random

import pytest
import torch
from torch import Tensor

from megarlhf.algos.losses import (
    Aggregation,
    explained_variance,
    policy_loss,
    token_weights,
    value_loss,
)


def grad_of(loss: Tensor, tensor: Tensor) -> list[float]:
    (grad,) = torch.autograd.grad(loss.sum(), tensor)
    return list(grad.tolist())


def ratios(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log().requires_grad_()


def test_policy_loss_by_hand() -> None:
    # Only two of the six cases are cut off: a good token already likelier, a bad one already less likely.
    log_probs = ratios(1.1, 1.5, 0.5, 1.1, 1.5, 0.5)
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0], dtype=torch.float64)
    loss, clipped = policy_loss(
        log_probs, torch.zeros(6), advantages, clip_eps_low=0.2, clip_eps_high=0.3, dual_clip=None
    )
    assert loss.tolist() == pytest.approx([-2.2, -2.6, -1.0, 2.2, 3.0, 1.6])
    assert clipped.tolist() == [False, True, False, False, False, True]
    assert grad_of(loss, log_probs) == pytest.approx([-2.2, 0.0, -1.0, 2.2, 3.0, 0.0])  # -r * A, or 0


def test_dual_clip_bounds_the_loss_of_bad_tokens_alone() -> None:
    log_probs = ratios(4.0, 2.5, 4.0)
    advantages = torch.tensor([-2.0, -2.0, 2.0], dtype=torch.float64)
    loss, clipped = policy_loss(
        log_probs, torch.zeros(3), advantages, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=3.0
    )
    assert loss.tolist() == pytest.approx([6.0, 5.0, -2.4])
    assert clipped.tolist() == [True, False, True]
    assert grad_of(loss, log_probs) == pytest.approx([0.0, 5.0, 0.0])


def slow_policy_loss(ratio: float, advantage: float, low: float, high: float, dual: float | None) -> float:
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    return -objective


@pytest.mark.parametrize("dual_clip", [None, 2.0])
def test_policy_loss_matches_a_loop_and_its_clipped_tokens_have_no_gradient(dual_clip: float | None) -> None:
    torch.manual_seed(0)
    log_probs = torch.randn(500, dtype=torch.float64, requires_grad=True)
    old, advantages = torch.randn(500, dtype=torch.float64), torch.randn(500, dtype=torch.float64)
    loss, clipped = policy_loss(log_probs, old, advantages, clip_eps_low=0.2, clip_eps_high=0.28, dual_clip=dual_clip)
    ratio = (log_probs - old).exp().tolist()
    expected = [slow_policy_loss(r, a, 0.2, 0.28, dual_clip) for r, a in zip(ratio, advantages.tolist(), strict=True)]
    assert loss.tolist() == pytest.approx(expected)
    assert [g == 0 for g in grad_of(loss, log_probs)] == clipped.tolist()


def test_policy_loss_starts_as_the_policy_gradient() -> None:
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.7, -0.4])
    loss, clipped = policy_loss(
        log_probs, log_probs.detach(), advantages, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=3.0
    )
    assert grad_of(loss, log_probs) == pytest.approx([-0.7, 0.4])
    assert not clipped.any()


def test_value_loss_by_hand() -> None:
    # V_old = 0, c = 0.2: inside; outside and clipped is worse; outside and clipped is better, so V's own error counts
    values = torch.tensor([0.1, 0.8, -0.8], dtype=torch.float64, requires_grad=True)
    returns = torch.ones(3, dtype=torch.float64)
    loss, clipped = value_loss(values, torch.zeros(3), returns, value_clip=0.2)
    assert loss.tolist() == pytest.approx([0.5 * 0.81, 0.5 * 0.64, 0.5 * 3.24])
    assert clipped.tolist() == [False, True, False]
    assert grad_of(loss, values) == pytest.approx([-0.9, 0.0, -1.8])


def test_value_loss_without_clip_is_half_the_square() -> None:
    loss, clipped = value_loss(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([1.0]), value_clip=None)
    assert loss.tolist() == [2.0]
    assert clipped.tolist() == [False]


def test_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    old, target = torch.randn(2, 20, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda y: policy_loss(y, old, target, clip_eps_low=0.2, clip_eps_high=0.3, dual_clip=2.0)[0], (x,)
    )
    assert torch.autograd.gradcheck(lambda y: value_loss(y, old, target, value_clip=0.2)[0], (x,))


@pytest.mark.parametrize(
    ("aggregation", "max_length", "expected"),
    [
        ("token", None, (1 + 2 + 3 + 10) / 4),
        ("sequence", None, ((1 + 2 + 3) / 3 + 10) / 2),
        ("constant", 8, (1 + 2 + 3 + 10) / (2 * 8)),
    ],
)
def test_aggregations_by_hand(aggregation: Aggregation, max_length: int | None, expected: float) -> None:
    weights, denominator = token_weights(torch.tensor([3, 1]), aggregation=aggregation, max_length=max_length)
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert (losses * weights.repeat_interleave(torch.tensor([3, 1]))).sum() / denominator == pytest.approx(expected)


@pytest.mark.parametrize(("aggregation", "max_length"), [("token", None), ("sequence", None), ("constant", 16)])
def test_every_split_gives_the_same_loss_and_gradient(aggregation: Aggregation, max_length: int | None) -> None:
    rng, lengths = random.Random(0), torch.tensor([5, 1, 9, 2, 7, 3])
    losses = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in lengths.tolist()]

    def share(indices: list[int], denominator: float) -> tuple[Tensor, float]:
        weights, own = token_weights(lengths[indices], aggregation=aggregation, max_length=max_length)
        return sum(losses[i].sum() * w for i, w in zip(indices, weights, strict=True)) / denominator, own

    _, denominator = token_weights(lengths, aggregation=aggregation, max_length=max_length)
    whole, _ = share(list(range(6)), denominator)
    whole_grads = torch.autograd.grad(whole, losses, retain_graph=True)
    for _ in range(5):
        order, cut = rng.sample(range(6), 6), rng.randint(1, 5)
        (first, own), (second, other) = (share(part, denominator) for part in (order[:cut], order[cut:]))
        assert own + other == denominator
        torch.testing.assert_close(first + second, whole)
        torch.testing.assert_close(torch.autograd.grad(first + second, losses), whole_grads)


def test_explained_variance_by_hand() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns + 5, returns) == pytest.approx(1.0)  # a constant offset is not variance
    assert explained_variance(torch.full((3,), 2.0), returns) == pytest.approx(0.0)
    assert explained_variance(torch.tensor([1.0, 1.0, 3.0]), returns) == pytest.approx(1 - (2 / 9) / (2 / 3))
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(torch.randn(3), torch.ones(3)))
    with pytest.raises(AssertionError):
        explained_variance(torch.ones(1), returns)
