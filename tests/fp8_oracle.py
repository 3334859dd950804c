"""FP8 by the book, in float64 and without PyTorch's types: every number is listed, and the nearest one is looked up."""

import math
from bisect import bisect_left
from functools import cache

import torch
from torch import Tensor

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


@cache
def fp8_values(form: str) -> list[float]:
    """All numbers from 0 up, arXiv:2209.05433 table 1: E4M3 gives up infinity, E5M2 does not."""
    mantissa_bits, bias = {"e4m3": (3, 7), "e5m2": (2, 15)}[form]
    steps, found = 2**mantissa_bits, []
    for exponent in range(2 ** (7 - mantissa_bits)):
        for mantissa in range(steps):
            whole = mantissa / steps + (exponent > 0)
            found.append(whole * 2.0 ** (max(exponent, 1) - bias))
    return [value for value in found if value <= LARGEST[form]]


def nearest(value: float, form: str) -> float:
    """The nearest number, of two as near the one with an even last bit; beyond the largest: the largest."""
    numbers = fp8_values(form)
    size = abs(value)
    place = bisect_left(numbers, size)
    if place == len(numbers):
        return math.copysign(numbers[-1], value)
    if place and size - numbers[place - 1] == numbers[place] - size:
        place -= (place - 1) % 2 == 0  # numbers alternate between an even and an odd last bit
    elif place and size - numbers[place - 1] < numbers[place] - size:
        place -= 1
    return math.copysign(numbers[place], value)


def at_scale(x: Tensor, scale: float, form: str) -> Tensor:
    """float64, what FP8 holds of float32 numbers at a float32 scale."""
    flat = (x.float() * torch.tensor(scale, dtype=torch.float32)).double().flatten().tolist()
    return torch.tensor([nearest(value, form) for value in flat], dtype=torch.float64).view(x.shape) / scale


def by_blocks(x: Tensor, form: str, rows: int, columns: int) -> Tensor:
    """float64, with the largest power of two as a scale that keeps each block within FP8."""
    found = torch.zeros(x.shape, dtype=torch.float64)
    for top in range(0, x.shape[0], rows):
        for left in range(0, x.shape[1], columns):
            part = x[top : top + rows, left : left + columns]
            amax = float(part.abs().max())
            scale = 2.0 ** math.floor(math.log2(LARGEST[form] / amax)) if amax else 1.0
            found[top : top + rows, left : left + columns] = at_scale(part, scale, form)
    return found
