"""Per-token losses of policy and critic, and the weights that sum them up.

A loss here is a tensor [t], one entry per response token. The caller multiplies by `token_weights`, sums, and divides
by one denominator of the whole global batch, so the gradient is the same for every split into ranks and micro-batches.
"""

import math
from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 80.0  # nats; ratios stay below exp(this), which float32 holds

Aggregation = Literal["token", "sequence", "constant"]


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate -min(r * A, clip(r, 1 - low, 1 + high) * A), r = exp(log_probs - old_log_probs).

    PPO, arXiv:1707.06347 equation 7, with two bounds as in DAPO's clip-higher, arXiv:2503.14476 section 3.1. With
    `dual_clip` = c the loss is at most -c * A where A < 0, arXiv:1912.09729.

    Args:
        log_probs: [t] float, under the policy in training; the gradient runs through it alone.
        old_log_probs: [t] float, under the policy that sampled, no gradient.
        advantages: [t] float, no gradient.
        dual_clip: above 1; None for plain PPO.
    Returns:
        loss [t], and clipped [t] bool: True where a bound (dual_clip's too) is active, and the gradient 0.
    """
    log_ratio = log_probs - old_log_probs
    # An infinite ratio times 0 is NaN, in a clipped token's gradient or where the advantage is 0. An unclipped token's
    # gradient stays enormous, so that the step is refused and not quietly without it.
    ratio = torch.exp(log_ratio - (log_ratio.detach() - MAX_LOG_RATIO).clamp(min=0.0))
    surrogate = ratio * advantages
    bounded = ratio.clamp(1.0 - clip_eps_low, 1.0 + clip_eps_high) * advantages
    objective = torch.minimum(surrogate, bounded)
    clipped = bounded < surrogate
    if dual_clip is not None:
        floor = dual_clip * advantages
        too_low = (advantages < 0) & (objective < floor)
        objective = torch.where(too_low, floor, objective)
        clipped = clipped | too_low
    return -objective, clipped


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Clipped squared error 0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).

    The value clipping of OpenAI's baselines PPO (ppo2), which OpenRLHF shares; arXiv:1707.06347 has the square alone.

    Args:
        values: [t] float, from the critic in training; the gradient runs through it alone.
        old_values: [t] float, from the critic before the update, no gradient.
        returns: [t] float, targets, no gradient.
        value_clip: c, in units of the values; None for the plain square.
    Returns:
        loss [t], and clipped [t] bool: True where the clipped square is the larger, and the gradient 0.
    """
    loss = (values - returns).square()
    if value_clip is None:
        return 0.5 * loss, torch.zeros_like(loss, dtype=torch.bool)
    # Clamped to the bounds themselves, so that a value inside them is exactly unchanged and never counts as clipped.
    near_old = values.clamp(old_values - value_clip, old_values + value_clip)
    clipped_loss = (near_old - returns).square()
    return 0.5 * torch.maximum(loss, clipped_loss), clipped_loss > loss


def token_weights(lengths: Tensor, *, aggregation: Aggregation, max_length: int | None = None) -> tuple[Tensor, float]:
    """Weight of each sample's tokens and the denominator of a batch: sum(weight * loss) / denominator is its loss.

    | aggregation | weight | denominator | loss |
    |---|---|---|---|
    | token | 1 | tokens | mean over tokens (DAPO, arXiv:2503.14476) |
    | sequence | 1 / length | sequences | mean over sequences of their token means (GRPO, arXiv:2402.03300) |
    | constant | 1 | sequences * max_length | sum over tokens, length-free (Dr. GRPO, arXiv:2503.20783) |

    The weights of a sample depend on that sample alone, and denominators of parts add up to that of the whole.

    Args:
        lengths: [b] int64, target tokens of each sample in the global batch (one optimizer step), each at least 1.
        max_length: the generation limit in tokens; for "constant".
    Returns:
        [b] float32, the same weight for all tokens of a sample, and the denominator.
    """
    assert len(lengths) and int(lengths.min()) >= 1, "a mean needs a sample, and a token in each"
    if aggregation == "token":
        return torch.ones(len(lengths)), float(lengths.sum())
    if aggregation == "sequence":
        return lengths.float().reciprocal(), float(len(lengths))
    assert max_length is not None, "the constant is the longest response"
    return torch.ones(len(lengths)), float(len(lengths) * max_length)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Fraction of the returns' variance that the critic accounts for: 1 - var(R - V) / var(R).

    Args:
        values: [n] float.
        returns: [n] float.
    Returns:
        At most 1; 0 for a critic that knows the mean alone, below 0 for a worse one. NaN where the returns do not vary.
    """
    assert values.shape == returns.shape
    variance = returns.double().var(correction=0).item()
    if variance == 0:
        return math.nan
    return 1.0 - (returns.double() - values.double()).var(correction=0).item() / variance
