"""pass@k: how likely one of k sampled answers to a prompt is correct."""

import math
from collections.abc import Sequence


def pass_at_k(num_correct: Sequence[int], num_samples: Sequence[int], *, k: int) -> float | None:
    """Mean over prompts of 1 - C(n - c, k) / C(n, k), the unbiased estimate from n samples of which c are correct.

    Chen et al. 2021, arXiv:2107.03374, equation 1; computed with whole numbers, so that nothing overflows or cancels.

    Args:
        num_correct: c of each prompt, at most its n.
        num_samples: n of each prompt; one with fewer than k says nothing of k answers and is left out.
    Returns:
        None where no prompt has k samples.
    """
    of_prompts = [
        1.0 - math.comb(n - c, k) / math.comb(n, k) for c, n in zip(num_correct, num_samples, strict=True) if n >= k
    ]
    return math.fsum(of_prompts) / len(of_prompts) if of_prompts else None


def reported_k(num_samples: int) -> list[int]:
    """The k to report of so many samples: 1, 2, 4, ... up to all of them."""
    powers = [2**power for power in range(num_samples.bit_length())]
    return sorted({*powers, num_samples}) if num_samples else []
