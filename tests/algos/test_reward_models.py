"""Losses of judging models against loops in plain Python."""

import math

import pytest
import torch

from megarlhf.algos.reward_models import pairwise_loss, step_loss

CHOSEN, REJECTED, MARGIN = [0.3, -1.2, 4.0, 2.0, 0.0], [0.1, 0.7, -3.0, 2.0, 1.5], [0.0, 0.5, 2.0, -0.4, 1.0]


@pytest.mark.parametrize("with_margin", [False, True])
def test_pairwise_loss_is_its_definition(with_margin: bool) -> None:
    """As sigmoid and as LogExp write it."""
    chosen, rejected, margin = (torch.tensor(x, dtype=torch.float64) for x in (CHOSEN, REJECTED, MARGIN))
    chosen.requires_grad_()
    found = pairwise_loss(chosen, rejected, margin if with_margin else None)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert chosen.grad is not None
    for place, (a, b, m) in enumerate(zip(CHOSEN, REJECTED, MARGIN, strict=True)):
        above = a - b - (m if with_margin else 0.0)
        assert found[place].item() == pytest.approx(-math.log(1 / (1 + math.exp(-above))), rel=1e-12)
        assert found[place].item() == pytest.approx(math.log(1 + math.exp(-above)), rel=1e-12)
        assert chosen.grad[place].item() == pytest.approx(-1 / (1 + math.exp(above)), rel=1e-12)


def test_pairwise_loss_does_not_overflow() -> None:
    found = pairwise_loss(torch.tensor([-500.0, 500.0]), torch.tensor([500.0, -500.0]), None)
    assert found.tolist() == [1000.0, 0.0]


def test_step_loss_is_its_definition() -> None:
    logits = [[0.2, -0.5, 1.0], [2.0, 1.9, 0.0], [0.0, 3.0, 0.1]]
    shares = [[0.0, 0.0, 1.0], [0.3, 0.7, 0.0], [0.5, 0.5, 0.0]]
    log_probs = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    loss, correct = step_loss(log_probs, torch.tensor(shares, dtype=torch.float64))
    for place, (row, share) in enumerate(zip(logits, shares, strict=True)):
        total = math.log(math.fsum(map(math.exp, row)))
        wanted = math.fsum(q * (total - x) for q, x in zip(share, row, strict=True))
        assert loss[place].item() == pytest.approx(wanted, rel=1e-12)
    assert correct.tolist() == [True, False, False], "the first of two equal shares is the label's likeliest"
