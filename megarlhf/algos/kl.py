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
    """
    difference = ref_log_probs - log_probs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference.square()
    # expm1 keeps the digits that exp(d) - 1 loses near d = 0; the clamp takes off its last-bit rounding.
    return (torch.expm1(difference) - difference).clamp(min=0.0)


class KLController:
    """The KL coefficient: constant, or driven so that the measured KL meets a target.

    Then a step multiplies it by 1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon, arXiv:1909.08593; its
    constant gain 0.1 is num_samples / horizon here, so that the pace does not depend on the batch size.

    Attributes:
        coef: weight of the KL penalty, reward per nat; above 0 where there is a target.
        target: KL aimed at, in the unit of the `kl` given to `update`; None keeps the coefficient.
        horizon: samples in which the coefficient changes by at most about a fifth.
    """

    def __init__(self, init_coef: float, *, target: float | None = None, horizon: int = 1) -> None:
        assert target is None or init_coef > 0, "0 times any factor stays 0"
        self.coef = init_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_samples: int) -> None:
        """Move the coefficient after a step, where there is a target.

        Args:
            kl: mean KL of the step's samples to the reference.
            num_samples: samples in the step, fewer than horizon / 0.2.
        Raises:
            ValueError: kl is NaN or infinite.
        """
        if self.target is None:
            return
        if not math.isfinite(kl):
            raise ValueError(f"kl={kl} is not finite: the policy or the reference gave broken log-probs")
        assert num_samples * MAX_RELATIVE_ERROR < self.horizon, "one step could take the coefficient to 0 or below"
        error = min(max(kl / self.target - 1.0, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        self.coef *= 1.0 + error * num_samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What a continued run needs: the coefficient. Target and horizon are configuration."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from the coefficient that `state_dict` gave; without a target what is configured counts.

        Raises:
            ValueError: it is 0, and there is a target.
        """
        if self.target is None:
            return
        if state["coef"] == 0:
            raise ValueError("the saved KL coefficient is 0, which no factor can move: start a new run with kl_target")
        self.coef = state["coef"]
