"""Per-token KL estimates, and the controllers of the coefficient that weighs them."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]

MAX_RELATIVE_ERROR = 0.2  # clip of (kl / target - 1), arXiv:1909.08593


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, *, estimator: KLEstimator) -> Tensor:
    """Estimate KL(policy || reference) at each token from the one token that the policy sampled.

    With d = ref_log_probs - log_probs: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d. In expectation over the policy k1
    and k3 are the KL, k2 is near it while the policies are close; k1 varies most and may be negative, k3 is never
    negative. J. Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html.

    As a loss they differ from what they estimate: on-policy the expected gradient is 0 for k1, that of
    KL(policy || reference) for k2 and that of KL(reference || policy) for k3.

    Args:
        log_probs: [t] float, log p of the sampled tokens under the policy that sampled them.
        ref_log_probs: [t] float, log p of the same tokens under the reference.
    Returns:
        [t] float, nats. Differentiable in both inputs.
    Raises:
        ValueError: an unknown estimator.
    """
    difference = ref_log_probs - log_probs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        # expm1 keeps the digits that exp(d) - 1 loses near d = 0; the clamp takes off its last-bit rounding.
        return (torch.expm1(difference) - difference).clamp(min=0.0)
    raise ValueError(f"kl_estimator={estimator} is unknown: use k1, k2 or k3")


class FixedKLController:
    """A KL coefficient that stays as configured.

    Attributes:
        coef: weight of the KL penalty, reward per nat.
    """

    def __init__(self, coef: float) -> None:
        _check_coef(coef)
        self.coef = coef

    def update(self, kl: float, num_samples: int) -> None:
        """Do nothing; here so that both controllers are driven alike."""

    def state_dict(self) -> dict[str, float]:
        """The coefficient, so that a run may be continued with an adaptive controller."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Do nothing: the coefficient is configuration, and a changed configuration counts."""


class AdaptiveKLController:
    """Drive the measured KL towards a target: coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon.

    arXiv:1909.08593; its constant gain 0.1 is num_samples / horizon here, so that the pace does not depend on the
    batch size.

    Attributes:
        coef: weight of the KL penalty, reward per nat.
        target: KL aimed at, in the unit of the `kl` given to `update`.
        horizon: samples in which the coefficient changes by at most about a fifth.
    """

    def __init__(self, init_coef: float, target: float, horizon: int) -> None:
        _check_coef(init_coef)
        if init_coef == 0:
            raise ValueError(f"init_kl_coef=0 with kl_target={target}; 0 times any factor stays 0: set it above 0")
        if not target > 0:
            raise ValueError(f"kl_target={target} must be above 0 (the error is relative to it)")
        if horizon < 1:
            raise ValueError(f"kl_horizon={horizon} must be at least 1 sample")
        self.coef = init_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_samples: int) -> None:
        """Move the coefficient after a step.

        Args:
            kl: mean KL of the step's samples to the reference.
            num_samples: samples in the step.
        Raises:
            ValueError: kl is NaN or infinite, or the step is so large that the coefficient could reach 0.
        """
        if not math.isfinite(kl):
            raise ValueError(f"kl={kl} is not finite: the policy or the reference gave broken log-probs")
        if num_samples * MAX_RELATIVE_ERROR >= self.horizon:
            raise ValueError(
                f"kl_horizon={self.horizon} with {num_samples} samples a step; one step could take the KL coefficient "
                f"to 0 or below: set kl_horizon above {num_samples * MAX_RELATIVE_ERROR:g}"
            )
        error = min(max(kl / self.target - 1.0, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        self.coef *= 1.0 + error * num_samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What a continued run needs: the coefficient. Target and horizon are configuration."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from the coefficient that `state_dict` gave.

        Raises:
            KeyError: the state has no `coef`.
            ValueError: it is 0, negative or not finite.
        """
        coef = state["coef"]
        _check_coef(coef)
        if coef == 0:
            raise ValueError("the saved KL coefficient is 0, which no factor can move: start a new run with kl_target")
        self.coef = coef


KLController = FixedKLController | AdaptiveKLController


def _check_coef(coef: float) -> None:
    if not (math.isfinite(coef) and coef >= 0):
        raise ValueError(
            f"init_kl_coef={coef} must be finite and at least 0 (below 0 it rewards leaving the reference)"
        )
