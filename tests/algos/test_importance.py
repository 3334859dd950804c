"""Weights of what another engine sampled, by hand and as expectations over a small vocabulary."""

import math

import pytest
import torch

from megarlhf.algos.importance import engine_ratio, masked, truncated

RATIOS = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
ROLLOUT = torch.tensor([-1.0, -0.3, -2.0, -0.7, -1.5, -3.0], dtype=torch.float64)
TRAINER = ROLLOUT + torch.tensor(RATIOS, dtype=torch.float64).log()


def test_ratio_is_of_the_trainer_over_the_engine_and_has_no_gradient() -> None:
    trainer = TRAINER.clone().requires_grad_()
    ratio = engine_ratio(trainer, ROLLOUT)
    assert ratio.tolist() == pytest.approx(RATIOS)
    assert not ratio.requires_grad
    assert math.isfinite(engine_ratio(torch.tensor([0.0]), torch.tensor([-500.0])).item())


def test_truncated() -> None:
    weights, capped = truncated(engine_ratio(TRAINER, ROLLOUT), cap=2.0)
    assert weights.tolist() == pytest.approx([0.25, 0.5, 1.0, 2.0, 2.0, 2.0])
    assert capped[[0, 1, 2, 4, 5]].tolist() == [False, False, False, True, True]


def test_masked() -> None:
    weights, outside = masked(torch.tensor(RATIOS), low=0.5, high=5.0)
    assert weights.tolist() == [0.0, 0.5, 1.0, 2.0, 4.0, 0.0]  # both bounds are inside
    assert outside.tolist() == [True, False, False, False, False, True]


def test_weights_turn_the_engines_expectation_into_the_trainers() -> None:
    """Sum over the vocabulary: E_mu[min(pi / mu, c) f] is E_pi[f] while no ratio is above c, and less otherwise."""
    mu, pi = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.15, 0.3, 0.25, 0.3])
    f = torch.tensor([5.0, 1.0, 2.0, 3.0])
    ratio = engine_ratio(pi.log(), mu.log())
    assert float((mu * ratio).sum()) == pytest.approx(1.0)
    for cap, expected in ((2.0, float((pi * f).sum())), (1.2, 0.1 * 1.2 * 5 + 0.2 * 1.2 * 1 + 0.25 * 2 + 0.3 * 3)):
        assert float((mu * truncated(ratio, cap=cap)[0] * f).sum()) == pytest.approx(expected)
