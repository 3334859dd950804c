"""Per-token losses of policy, critic and supervised training, and the weights that sum them up.

A loss here is a tensor [t], one entry per response token. The caller multiplies by `token_weights`, sums, and divides
by one denominator of the whole global batch, so the gradient is the same for every split into ranks and micro-batches.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from megarlhf.algos.kl import kl_estimate

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
    Raises:
        ValueError: dual_clip is 1 or less.
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
        if dual_clip <= 1:
            raise ValueError(
                f"dual_clip={dual_clip} must be above 1 (at 1 it stops samples that have not moved): use 3"
            )
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


def sft_loss(log_probs: Tensor) -> Tensor:
    """Cross-entropy with the target tokens: -log p.

    Args:
        log_probs: [t] float, log p of each target token.
    Returns:
        [t] float, nats.
    """
    return -log_probs


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
        max_length: the generation limit in tokens; for "constant" and no other.
    Returns:
        [b] float32, the same weight for all tokens of a sample, and the denominator.
    Raises:
        ValueError: no sample, an empty sample, an unknown aggregation, or max_length missing or not wanted.
    """
    if not len(lengths) or int(lengths.min()) < 1:
        raise ValueError(
            f"lengths={lengths.tolist()}: a batch needs a sample, and each sample a token, for a mean to exist"
        )
    if (aggregation == "constant") != (max_length is not None):
        raise ValueError(
            f"aggregation={aggregation} with max_length={max_length}: only constant takes one, and needs it"
        )
    if aggregation == "token":
        return torch.ones(len(lengths)), float(lengths.sum())
    if aggregation == "sequence":
        return lengths.float().reciprocal(), float(len(lengths))
    if max_length is not None:
        return torch.ones(len(lengths)), float(len(lengths) * max_length)
    raise ValueError(f"aggregation={aggregation} is unknown: use token, sequence or constant")


def approx_kl(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """How far the update has moved: KL(old || new) per token, r - 1 - log r with r = exp(log_probs - old_log_probs).

    The k3 estimator, with the old policy as the one that sampled.

    Args:
        log_probs: [t] float, under the policy in training.
        old_log_probs: [t] float, under the policy that sampled.
    Returns:
        [t] float, nats, never negative.
    """
    return kl_estimate(old_log_probs, log_probs, estimator="k3")


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Share of the returns' variance that the critic accounts for: 1 - var(R - V) / var(R).

    Args:
        values: [n] float.
        returns: [n] float.
    Returns:
        At most 1; 0 for a critic that knows the mean alone, below 0 for a worse one. NaN where the returns do not vary.
    Raises:
        ValueError: the shapes differ.
    """
    if values.shape != returns.shape:
        raise ValueError(f"values has shape {tuple(values.shape)} and returns {tuple(returns.shape)}: must be equal")
    variance = returns.double().var(correction=0).item()
    if variance == 0:
        return math.nan
    return 1.0 - (returns.double() - values.double()).var(correction=0).item() / variance
