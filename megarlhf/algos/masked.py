"""Reductions over a selection of tokens: sum, mean with an explicit denominator, whitening of ragged tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the values where the mask is True.

    Args:
        values: [...] float; entries outside the mask may be anything, NaN included.
        mask: bool, the shape of `values`.
    Returns:
        [] scalar, dtype of `values`.
    Raises:
        ValueError: the shapes differ.
    """
    if values.shape != mask.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)} and values {tuple(values.shape)}: they must be equal")
    # where, not a product: 0 * NaN would let the unselected entries in.
    return torch.where(mask, values, values.new_zeros(())).sum()


def masked_mean(values: Tensor, mask: Tensor, *, denominator: float | Tensor) -> Tensor:
    """Sum of the selected values over a denominator that the caller knows.

    The denominator is not counted from the mask: a rank that holds a part of the batch divides by the size of the
    whole, and then the parts add up to the mean, however the batch is split.

    Args:
        values: [...] float.
        mask: bool, the shape of `values`.
        denominator: selected entries in the whole batch, above 0.
    Returns:
        [] scalar, dtype of `values`.
    """
    return masked_sum(values, mask) / denominator


def whiten(tensors: Sequence[Tensor], *, eps: float) -> list[Tensor]:
    """Shift and scale to zero mean and unit variance over all elements together: (x - mean) / sqrt(var + eps).

    Mean and variance (divided by n, not n - 1) run in float64, so a constant batch becomes 0 and not rounding noise
    scaled up.

    Args:
        tensors: one float tensor [n_i] per sample.
        eps: added to the variance, in squared units of the tensors.
    Returns:
        New tensors of the same shapes and dtypes; none shares storage with another.
    Raises:
        ValueError: there is no element at all.
    """
    if sum(tensor.numel() for tensor in tensors) == 0:
        raise ValueError("nothing to whiten: the batch has no tokens")
    flat = torch.cat([tensor.flatten() for tensor in tensors]).double()
    mean = flat.mean()
    inverse_std = (flat.var(correction=0) + eps).rsqrt()
    return [((tensor.double() - mean) * inverse_std).to(tensor.dtype) for tensor in tensors]
