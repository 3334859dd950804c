"""Whitening, against Python's own statistics."""

import math
import statistics

import pytest
import torch

from megarlhf.algos.whitening import whiten


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


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        whiten(torch.ones(0), eps=0.0)
