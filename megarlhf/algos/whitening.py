"""Whitening."""

from torch import Tensor


def whiten(values: Tensor, *, eps: float) -> Tensor:
    """Shift and scale to zero mean and unit variance: (x - mean) / sqrt(var + eps).

    Mean and variance (divided by n, not n - 1) run in float64, so a constant batch becomes 0 and not rounding noise
    scaled up.

    Args:
        values: [t] float.
        eps: added to the variance, in squared units of the values.
    Returns:
        New tensor of the same shape and dtype.
    Raises:
        ValueError: there is no element at all.
    """
    if not values.numel():
        raise ValueError("nothing to whiten: the batch has no tokens")
    centred = values.double()
    centred -= centred.mean()
    variance = centred.dot(centred) / len(centred)
    return centred.mul_((variance + eps).rsqrt()).to(values.dtype)
