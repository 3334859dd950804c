"""The soft penalty of responses that come close to the length limit."""

from collections.abc import Sequence


def overlong_penalties(lengths: Sequence[int], *, max_length: int, buffer: int, factor: float) -> list[float]:
    """0 up to max_length - buffer tokens, from there linearly down to -factor at max_length.

    DAPO's soft overlong punishment, arXiv:2503.14476 equation 13, whose factor is 1.

    Args:
        lengths: tokens of each response.
        max_length: the generation limit in tokens.
        buffer: from 1 to max_length tokens.
    Returns:
        What is added to each reward, 0 or less.
    """
    assert 1 <= buffer <= max_length
    return [-factor * min(1.0, max(0.0, (length - (max_length - buffer)) / buffer)) for length in lengths]
