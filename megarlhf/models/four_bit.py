"""Frozen matrices in 4 bits: NF4 of QLoRA (arXiv:2305.14314, section 3), by bitsandbytes.

64 numbers of a row are a block, which lies on one rank in every layout, with its largest magnitude in float32: 4.5 bits
a number. Deviation from the paper: these magnitudes are not quantised in turn, as the mean that bitsandbytes takes off
them first is that of a rank's part and would be another in each layout.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import linear_with_frozen_weight
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter

from megarlhf.models.targets import BLOCK
from megarlhf.parallel.device import current_device

_LIKE = "dense_like"  # attribute of a quantised parameter: shape and type of its matrix, without memory


@torch.no_grad()
def quantise(linear: Any) -> None:
    """Keep the weight of a linear layer of Megatron-Core's in 4 bits, on the device, and compute with it.

    The parameter's data becomes bytes: two numbers in each, then the blocks' magnitudes. A pass has the matrix itself
    only while it multiplies.
    """
    from bitsandbytes.functional import quantize_4bit  # seconds, for those who ask for it

    weight = linear.weight
    assert weight.shape[1] % BLOCK == 0, "check_quantised comes first"
    codes, state = quantize_4bit(weight.data.to(current_device()), blocksize=BLOCK, quant_type="nf4")
    setattr(weight, _LIKE, torch.zeros((), dtype=weight.dtype).expand(weight.shape))
    weight.data = torch.cat([codes.view(-1), state.absmax.view(torch.uint8)])
    linear._forward_impl = _product


def dense_like(weight: Tensor) -> Tensor:
    """A tensor of shape and type of the matrix, whatever its numbers: the weight itself where it is not quantised."""
    like: Tensor = getattr(weight, _LIKE, weight)
    return like


def dense(weight: Tensor) -> Tensor:
    """The matrix of a quantised weight, new; any other weight's own data."""
    like = dense_like(weight)
    if like is weight:
        return weight.data
    from bitsandbytes.functional import QuantState, dequantize_4bit

    codes, magnitudes = weight.data.split([like.numel() // 2, weight.numel() - like.numel() // 2])
    state = QuantState(
        magnitudes.view(torch.float32), shape=like.shape, dtype=like.dtype, blocksize=BLOCK, quant_type="nf4"
    )
    matrix: Tensor = dequantize_4bit(codes, state)
    return matrix


def _product(*, weight: Parameter, **options: Any) -> Tensor:
    """In the place of a linear layer's own; all that it saves for the backward pass is its weight, which stays here."""
    with saved_tensors_hooks(lambda _: weight, dense):
        output: Tensor = linear_with_frozen_weight(weight=dense(weight), **options)
    return output
