"""Distillation over a teacher's likeliest tokens against a scalar loop."""

import math
from typing import Literal

import pytest
import torch

from megarlhf.algos.distillation import bucket_divergence

DIRECTIONS: tuple[Literal["forward"], Literal["reverse"]] = ("forward", "reverse")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_buckets_are_the_scalar_loop_and_at_most_the_whole_divergence(direction: Literal["forward", "reverse"]) -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    for k in (1, 3, 8):
        both = [torch.cat([each[:, :k], each[:, k:].logsumexp(-1, keepdim=True)], -1) for each in (student, teacher)]
        found, entropy = bucket_divergence(*both, direction=direction)
        for row in range(6):
            s, t = both[0][row].tolist(), both[1][row].tolist()
            p, q = (t, s) if direction == "forward" else (s, t)
            assert found[row].item() == pytest.approx(
                math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
            )
            assert entropy[row].item() == pytest.approx(-math.fsum(math.exp(a) * a for a in t))
        whole, _ = bucket_divergence(student, teacher, direction=direction)
        assert (found >= 0).all() and (found <= whole + 1e-12).all()
        same, _ = bucket_divergence(both[1], both[1], direction=direction)
        assert not same.any()
        if k == 8:
            torch.testing.assert_close(found, whole)
