"""Rounding to FP8, against hand-worked numbers and against FP8's numbers listed one by one."""

import math

import pytest
import torch

from megarlhf.algos.fp8 import (
    gradient_dtype,
    largest,
    num_saturated,
    rounded,
    rounded_blocks,
    rounded_tensor,
    scale_of,
    with_new_amax,
)
from tests.fp8_oracle import fp8_values, nearest

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def test_the_oracle_knows_fp8() -> None:
    """Counts, ends and steps of arXiv:2209.05433, table 1."""
    e4m3, e5m2 = fp8_values("e4m3"), fp8_values("e5m2")
    assert (e4m3[-1], e5m2[-1]) == (448.0, 57344.0)
    assert (len(e4m3), len(e5m2)) == (127, 124)  # with 0, without signs
    assert (e4m3[1], e5m2[1]) == (2.0**-9, 2.0**-16)
    assert [1.0, 1.125, 1.25] == [v for v in e4m3 if 1 <= v <= 1.25]


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_rounding_is_to_the_nearest_number(form: str) -> None:
    dtype = {"e4m3": E4M3, "e5m2": E5M2}[form]
    x = torch.randn(4000, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 4000)
    found = rounded(x, torch.ones(()), dtype)
    assert found.double().tolist() == [nearest(value, form) for value in x.double().tolist()]


def test_hand_worked_scales() -> None:
    """448 / 3.5 = 128 and 57344 / 3.5 = 16384; rounded down to powers of two 448 / 3 = 149.33 is 128."""
    amax = torch.tensor([3.5, 3.0, 0.0, math.inf, math.nan])
    assert scale_of(amax, E4M3)[0] == 128 and scale_of(amax, E5M2)[0] == 16384
    assert scale_of(amax, E4M3, power_of_two=True).tolist() == [128, 128, 1, 1, 1]
    assert scale_of(torch.tensor(1e-38), E4M3) == torch.finfo(torch.float32).max  # not infinity
    # at 128: 0.3 is 38.4, between 36 and 40 -> 40; 0.01 is 1.28, between 1.25 and 1.375 -> 1.25; -3.5 is -448
    x = torch.tensor([3.5, 0.3, 0.01, -3.5])
    assert (rounded_tensor(x, E4M3) * 128).tolist() == [448, 40, 1.25, -448]


def test_scales_are_rounded_once() -> None:
    """The quotient in float64, rounded to float32; by a reciprocal every tenth or so is another number."""
    amax = torch.rand(1000, generator=torch.Generator().manual_seed(2)) + 0.01
    expected = (448.0 / amax.double()).float()
    assert torch.equal(scale_of(amax, E4M3), expected)
    assert torch.equal(with_new_amax(amax[None].clone(), torch.ones(1000), E4M3, "max"), expected)
    assert not torch.equal(448.0 / amax, expected)


def test_what_is_beyond_the_largest_is_cut_and_counted() -> None:
    x = torch.tensor([500.0, -448.0, 448.1, 1.0, math.inf, math.nan])
    found = rounded(x, torch.ones(()), E4M3)
    assert found[:5].tolist() == [448, -448, 448, 1, 448] and found[5].isnan()
    assert num_saturated(x, torch.ones(()), E4M3) == 3
    assert largest(x).isnan() and largest(torch.tensor([1.0, -math.inf])) == math.inf
    assert largest(torch.empty(0, 4)) == 0


def test_blocks_have_their_own_scales() -> None:
    """A large number spoils its own block alone, and the last blocks are smaller."""
    x = torch.full((3, 5), 0.01)
    x[0, 0] = 1000.0
    found = rounded_blocks(x, E4M3, rows=2, columns=4)
    # 448 / 1000 -> 0.25: 0.0025 is between 0.00195 (2^-9) and 0.0039 -> 2^-9, over 0.25
    assert found[0, 0] == 1024  # 250 lies between 240 and 256, at 0.25
    assert found[0, 1] == found[1, 3] == 2.0**-9 / 0.25
    # 448 / 0.01 = 44800 -> 32768: 327.68 lies between 320 and 352 -> 320
    assert found[0, 4] == found[2, 0] == found[2, 4] == 320 / 32768
    assert rounded_blocks(torch.empty(0, 5), E4M3, rows=1, columns=4).shape == (0, 5)


@pytest.mark.parametrize(("algorithm", "expected"), [("most_recent", [448 / 2, 448 / 3]), ("max", [448 / 8, 448 / 3])])
def test_delayed_scales_move_on(algorithm: str, expected: list[float]) -> None:
    """delayed_scaling.cu: the newest goes behind, an empty row in front; a row of nothing leaves the scale."""
    history = torch.tensor([[2.0, 3.0, 0.0, math.inf], [8.0, 1.0, 0.0, 1.0], [4.0, 2.0, 0.0, 1.0]])
    scale = with_new_amax(history, torch.full((4,), 7.0), E4M3, algorithm)  # type: ignore[arg-type]
    assert scale[:2].tolist() == pytest.approx(expected)
    assert scale[2:].tolist() == [7, 7]
    assert history[:, 0].tolist() == [0, 4, 2] and history[:, 1].tolist() == [0, 2, 3]
    alone = torch.tensor([[5.0]])
    assert with_new_amax(alone, torch.ones(1), E5M2, algorithm).item() == pytest.approx(57344 / 5)  # type: ignore[arg-type]
    assert alone.item() == 0


def test_gradients_are_e5m2_in_the_hybrid_format() -> None:
    assert (gradient_dtype("hybrid"), gradient_dtype("e4m3")) == (E5M2, E4M3)
