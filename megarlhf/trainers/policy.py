"""The actor's objective: clipped surrogate, with the KL to the reference in the loss if asked for."""

from dataclasses import dataclass

from torch import Tensor

from megarlhf.algos.kl import KLEstimator, kl_estimate
from megarlhf.algos.losses import approx_kl, policy_loss
from megarlhf.data.types import MicroBatch
from megarlhf.engine.objective import Metrics, Objective, TokenOutputs


@dataclass(frozen=True, kw_only=True)
class PolicyLossOptions:
    """Coefficients of the actor's loss."""

    clip_eps_low: float
    clip_eps_high: float
    dual_clip: float | None
    entropy_coef: float
    kl_loss_coef: float  # 0 where the KL is part of the reward
    kl_estimator: KLEstimator


def policy_objective(options: PolicyLossOptions) -> Objective:
    """PPO's loss per token, weighted and summed. arXiv:1707.06347 equation 7, minus entropy, plus the KL of GRPO.

    Fields of the micro-batch: `advantages`, `weights`; `old_log_probs`, absent where the rows are trained once by the
    very policy that this forward pass computes, whose ratio is then 1; `ref_log_probs` where kl_loss_coef is not 0.
    """

    def loss(outputs: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        mask, fields = batch.target_mask, batch.fields
        assert outputs.log_probs is not None and outputs.entropy is not None
        log_probs, entropy, weights = outputs.log_probs[mask], outputs.entropy[mask], fields["weights"][mask]
        old = fields["old_log_probs"][mask] if "old_log_probs" in fields else log_probs.detach()
        surrogate, clipped = policy_loss(
            log_probs,
            old,
            fields["advantages"][mask],
            clip_eps_low=options.clip_eps_low,
            clip_eps_high=options.clip_eps_high,
            dual_clip=options.dual_clip,
        )
        total = surrogate
        if options.entropy_coef:
            total = total - options.entropy_coef * entropy
        kl = log_probs.new_zeros(len(log_probs))
        if options.kl_loss_coef:
            kl = kl_estimate(log_probs, fields["ref_log_probs"][mask], estimator=options.kl_estimator)
            total = total + options.kl_loss_coef * kl
        detached = log_probs.detach()
        metrics = {
            "clip_frac": clipped.float(),
            "entropy": entropy.detach(),
            "approx_kl": approx_kl(detached, old),
            "ratio_mean": (detached - old).exp(),
            "kl": kl.detach(),
        }
        return (total * weights).sum(), {name: (value.sum(), len(value)) for name, value in metrics.items()}

    return Objective(
        loss=loss,
        metric_names=("clip_frac", "entropy", "approx_kl", "ratio_mean", "kl"),
        entropy="loss" if options.entropy_coef else "metric",
    )
