"""Masked sums and whitening, against Python's own sums and statistics."""

import math
import statistics

import pytest
import torch

from megarlhf.algos.masked import masked_mean, masked_sum, whiten


def test_masked_sum_ignores_what_is_not_selected() -> None:
    values = torch.tensor([1.0, math.nan, 3.0, math.inf], requires_grad=True)
    total = masked_sum(values, torch.tensor([True, False, True, False]))
    (grad,) = torch.autograd.grad(total, values)
    assert total.item() == 4.0
    assert grad.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_masked_sum_refuses_a_mask_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match="mask"):
        masked_sum(torch.ones(3), torch.ones(3, 1, dtype=torch.bool))


def test_parts_of_masked_mean_add_up_to_the_mean() -> None:
    values = torch.tensor([2.0, 4.0, 9.0, 5.0])
    mask = torch.tensor([True, True, False, True])
    parts = [masked_mean(values[part], mask[part], denominator=3) for part in (slice(0, 1), slice(1, 4))]
    assert sum(part.item() for part in parts) == pytest.approx(11 / 3)


def test_whiten_takes_one_mean_and_variance_over_all_tensors() -> None:
    # mean 3, variance (4 + 0 + 4) / 3
    whitened = whiten([torch.tensor([1.0]), torch.tensor([3.0, 5.0])], eps=0.0)
    assert whitened[0].tolist() == pytest.approx([-math.sqrt(1.5)])
    assert whitened[1].tolist() == pytest.approx([0.0, math.sqrt(1.5)])


def test_whiten_matches_the_statistics_module() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(n) * 7 + 100 for n in (5, 1, 9)]
    flat = [x for tensor in tensors for x in tensor.tolist()]
    mean, variance = statistics.fmean(flat), statistics.pvariance(flat)
    for tensor, whitened in zip(tensors, whiten(tensors, eps=0.1), strict=True):
        expected = [(x - mean) / math.sqrt(variance + 0.1) for x in tensor.tolist()]
        assert whitened.tolist() == pytest.approx(expected, abs=1e-6)
        assert whitened.dtype == torch.float32


def test_whiten_makes_a_constant_batch_zero() -> None:
    assert torch.cat(whiten([torch.full((3000,), 8.1), torch.full((1,), 8.1)], eps=1e-8)).abs().max() < 1e-9


def test_whiten_results_own_their_storage() -> None:
    first, _ = whiten([torch.arange(3.0), torch.arange(1000.0)], eps=0.0)
    assert first.untyped_storage().nbytes() == 3 * 4  # a view would drag the whole batch along when it is sent


@pytest.mark.parametrize("tensors", [[], [torch.ones(0)]])
def test_whiten_refuses_an_empty_batch(tensors: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        whiten(tensors, eps=0.0)
