"""FP8 by rounding: a tensor as the numbers that TransformerEngine's recipes and vLLM would compute with.

A scale brings a tensor's largest number to FP8's largest (448 for E4M3, 57344 for E5M2), numbers beyond that are cut to
it, and what FP8 holds is divided by the scale again. Micikevicius et al., arXiv:2209.05433; blocks as in DeepSeek-V3,
arXiv:2412.19437 section 3.3. Scales are as TransformerEngine computes them (common/recipe/recipe_common.cuh,
delayed_scaling.cu).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Format = Literal["e4m3", "hybrid"]
AmaxAlgorithm = Literal["most_recent", "max"]
FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
BLOCK = 128


def gradient_dtype(form: Format) -> torch.dtype:
    """FP8's type of gradients; values of the forward pass are E4M3 in both formats."""
    return torch.float8_e5m2 if form == "hybrid" else torch.float8_e4m3fn


def largest(x: Tensor) -> Tensor:
    """[] float32, the largest |x|; NaN where x holds one, 0 where x is empty."""
    if not x.numel():
        return x.new_zeros((), dtype=torch.float32)
    low, high = x.aminmax()
    return torch.maximum(-low, high).float()


def scale_of(amax: Tensor, dtype: torch.dtype, *, power_of_two: bool = False) -> Tensor:
    """Scales, float32, that bring `amax` to FP8's largest number; 1 where amax is 0 or not finite.

    Args:
        amax: float32 of any shape.
        power_of_two: round scales down to a power of two, which loses nothing to the scale itself.
    """
    scale = _quotient(dtype, amax).clamp(max=torch.finfo(torch.float32).max)
    if power_of_two:
        scale = torch.ldexp(torch.full_like(scale, 0.5), torch.frexp(scale).exponent)
    return torch.where((amax > 0) & torch.isfinite(amax), scale, torch.ones_like(scale))


def _quotient(dtype: torch.dtype, amax: Tensor) -> Tensor:
    """FP8's largest number over amax, rounded once; PyTorch's `number / tensor` multiplies by a reciprocal."""
    return torch.full_like(amax, FP8_MAX[dtype]) / amax


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 numbers that FP8 holds of x times the scale, over the scale; NaN stays NaN.

    Args:
        scale: float32, of a shape that broadcasts to x.
    """
    limit = FP8_MAX[dtype]
    return (x.float() * scale).clamp_(-limit, limit).to(dtype).float().mul_(1.0 / scale)


def num_saturated(x: Tensor, scale: Tensor, dtype: torch.dtype) -> int:
    """Numbers of x that lie beyond FP8's largest at this scale."""
    return int((x.float() * scale).abs().gt(FP8_MAX[dtype]).sum())


def rounded_tensor(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x with one scale, from its own largest number."""
    return rounded(x, scale_of(largest(x), dtype), dtype)


def rounded_blocks(
    x: Tensor, dtype: torch.dtype, *, rows: int, columns: int, power_of_two: bool = True
) -> Tensor:
    """x [m, n] with a scale for each block of `rows` by `columns`; the last ones may be smaller."""
    m, n = x.shape
    if not x.numel():
        return x.float()
    whole = F.pad(x.float(), (0, -n % columns, 0, -m % rows))
    blocks = whole.view(whole.shape[0] // rows, rows, whole.shape[1] // columns, columns)
    scale = scale_of(blocks.abs().amax((1, 3), keepdim=True), dtype, power_of_two=power_of_two)
    return rounded(blocks, scale, dtype).view(whole.shape)[:m, :n]


def with_new_amax(history: Tensor, scale: Tensor, dtype: torch.dtype, algorithm: AmaxAlgorithm) -> Tensor:
    """Delayed scaling's next scale; the history moves on in place.

    Args:
        history: [length, k] float32: row 0 has the largest numbers since the last call, the others those before, the
            latest of them last.
        scale: [k] float32, the present one, which stays where the history has nothing, or infinity.
    """
    known = torch.nan_to_num(history, nan=0.0, posinf=torch.inf)
    amax = known.amax(0) if algorithm == "max" else history[0].clone()
    history.copy_(history.roll(-1, 0))
    history[0] = 0.0
    return torch.where((amax > 0) & torch.isfinite(amax), _quotient(dtype, amax), scale)
