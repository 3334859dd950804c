"""Losses of preferences against scalar loops in float64."""

import math
from typing import Any

import pytest
import torch

from megarlhf.algos.preferences import dpo_loss, kto_loss

CHOSEN = torch.tensor([0.0, 1.3, -2.0, 40.0, -300.0, 5.0], dtype=torch.float64)
REJECTED = torch.tensor([0.0, -0.4, 3.5, -60.0, 200.0, 5.5], dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + exp(-x))), also where exp overflows."""
    return -math.log1p(math.exp(-x)) if x > -700 else x


def dpo_pair(chosen: float, rejected: float, *, beta: float, label_smoothing: float, ipo: bool) -> float:
    """arXiv:2305.18290 equation 7, conservative by label_smoothing; arXiv:2310.12036 equation 17."""
    if ipo:
        return ((chosen - rejected) - 1 / (2 * beta)) ** 2
    right, wrong = (log_sigmoid(sign * beta * (chosen - rejected)) for sign in (1, -1))
    return -(1 - label_smoothing) * right - label_smoothing * wrong


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1, "label_smoothing": 0.0, "ipo": False},
        {"beta": 0.7, "label_smoothing": 0.2, "ipo": False},
        {"beta": 0.3, "label_smoothing": 0.0, "ipo": True},
    ],
)
def test_dpo_loss_is_its_scalar_loop(options: dict[str, Any]) -> None:
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    losses = dpo_loss(chosen, rejected, **options)
    pairs = list(zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True))
    assert losses.tolist() == pytest.approx([dpo_pair(*pair, **options) for pair in pairs], rel=1e-12)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    step = 1e-6
    slopes = [
        (dpo_pair(first + step, second, **options) - dpo_pair(first - step, second, **options)) / (2 * step)
        for first, second in pairs
    ]
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-8)
    assert rejected.grad.tolist() == pytest.approx([-slope for slope in slopes], rel=1e-6, abs=1e-8)


def kto_row(log_ratio: float, desirable: bool, kl: float, *, beta: float, weights: tuple[float, float]) -> float:
    """arXiv:2402.01306 equation 8: lambda - lambda * sigmoid."""
    distance = log_ratio - kl if desirable else kl - log_ratio
    weight = weights[0] if desirable else weights[1]
    return weight * (1 - 1 / (1 + math.exp(-beta * distance)))


def test_kto_loss_is_its_scalar_loop() -> None:
    log_ratios = torch.tensor([0.0, 2.5, -1.5, 0.7, 30.0], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, False, True, False, True])
    losses = kto_loss(
        log_ratios,
        desirable,
        torch.tensor(0.9, dtype=torch.float64),
        beta=0.3,
        desirable_loss_weight=1.4,
        undesirable_loss_weight=0.8,
    )
    rows = list(zip(log_ratios.tolist(), desirable.tolist(), strict=True))

    def row(log_ratio: float, wanted: bool) -> float:
        return kto_row(log_ratio, wanted, 0.9, beta=0.3, weights=(1.4, 0.8))

    assert losses.tolist() == pytest.approx([row(*each) for each in rows], rel=1e-12)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    slopes = [(row(each + 1e-6, wanted) - row(each - 1e-6, wanted)) / 2e-6 for each, wanted in rows]
    assert log_ratios.grad is not None
    assert log_ratios.grad.tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-9)
