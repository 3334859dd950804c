"""Weights of tokens that another engine sampled than the one that trains: the two disagree on the same weights.

Precision, kernels and expert routing differ, so the sampling policy is mu = exp(rollout log-probs) and not the
trainer's pi_old; each token's policy gradient is multiplied by (a bounded form of) pi_old / mu.
"""

import torch
from torch import Tensor

from megarlhf.algos.losses import MAX_LOG_RATIO


def engine_ratio(trainer_log_probs: Tensor, rollout_log_probs: Tensor) -> Tensor:
    """pi_old / mu of each sampled token; its mean over samples of mu is 1.

    Args:
        trainer_log_probs: [t] float, of the trainer under the weights that sampled.
        rollout_log_probs: [t] float, of the inference engine.
    Returns:
        [t] float, no gradient, finite where both are.
    """
    return (trainer_log_probs - rollout_log_probs).detach().clamp(max=MAX_LOG_RATIO).exp()


def truncated(ratio: Tensor, *, cap: float) -> tuple[Tensor, Tensor]:
    """Truncated importance sampling: min(ratio, cap).

    F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025,
    fengyao.notion.site/off-policy-rl; there cap is called C.

    Args:
        ratio: [t] float, from engine_ratio.
        cap: at least 1.
    Returns:
        weights [t], and [t] bool: True where the cap holds.
    """
    return ratio.clamp(max=cap), ratio > cap


def masked(ratio: Tensor, *, low: float, high: float) -> tuple[Tensor, Tensor]:
    """IcePop: the ratio itself inside [low, high], 0 outside, so that such a token moves nothing.

    Ling Team, "Every Step Evolves", arXiv:2510.18855 section 2.3.2, where the bounds are alpha and beta.

    Args:
        ratio: [t] float, from engine_ratio.
    Returns:
        weights [t], and [t] bool: True where the ratio is outside.
    """
    outside = (ratio < low) | (ratio > high)
    return torch.where(outside, 0.0, ratio), outside
