"""The actor's objective: the clipped surrogate, entropy and KL per token."""

from dataclasses import dataclass

from torch import Tensor

from megarlhf.algos.importance import engine_ratio, masked, truncated
from megarlhf.algos.kl import KLEstimator, kl_estimate
from megarlhf.algos.losses import policy_loss
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
    tis_cap: float | None = None  # truncates the weight of what the inference engine sampled; None: weights are 1
    tis_mask_range: tuple[float, float] | None = None  # leaves tokens of other weights out instead


def policy_objective(options: PolicyLossOptions) -> Objective:
    """PPO's loss per token, weighted and summed. arXiv:1707.06347 equation 7, minus entropy, plus the KL of GRPO.

    Fields of the micro-batch: `advantages`, `weights`; `old_log_probs`, absent where the rows are trained once by the
    very policy that this forward pass computes, whose ratio is then 1; `ref_log_probs` where kl_loss_coef is not 0;
    `rollout_log_probs` where tis_cap or tis_mask_range is given, which then weigh the surrogate, and it alone.
    """
    corrects = options.tis_cap is not None or options.tis_mask_range is not None

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
        metrics: dict[str, Tensor] = {}
        if corrects:
            correction, metrics = _correction(old, fields["rollout_log_probs"][mask], options)
            surrogate = surrogate * correction
        total = surrogate
        if options.entropy_coef:
            total = total - options.entropy_coef * entropy
        kl = log_probs.new_zeros(len(log_probs))
        if options.kl_loss_coef:
            kl = kl_estimate(log_probs, fields["ref_log_probs"][mask], estimator=options.kl_estimator)
            total = total + options.kl_loss_coef * kl
        detached = log_probs.detach()
        metrics |= {
            "clip_frac": clipped.float(),
            "entropy": entropy.detach(),
            "approx_kl": kl_estimate(old, detached, estimator="k3"),  # KL(old || new) by the old policy's samples
            "ratio_mean": (detached - old).exp(),
            "kl": kl.detach(),
        }
        return (total * weights).sum(), {name: (value.sum(), len(value)) for name, value in metrics.items()}

    names = ("clip_frac", "entropy", "approx_kl", "ratio_mean", "kl")
    return Objective(
        loss=loss,
        metric_names=(*names, "tis_mean", "tis_clip_frac") if corrects else names,
        entropy="loss" if options.entropy_coef else "metric",
    )


def _correction(old: Tensor, rollout: Tensor, options: PolicyLossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """[t] weights for what the inference engine sampled, and their metrics.

    Args:
        old: [t] the trainer's log-probs under the weights that sampled.
        rollout: [t] the engine's.
    """
    ratio = engine_ratio(old, rollout)
    if options.tis_mask_range is not None:
        low, high = options.tis_mask_range
        weights, outside = masked(ratio, low=low, high=high)
    else:
        assert options.tis_cap is not None
        weights, outside = truncated(ratio, cap=options.tis_cap)
    return weights, {"tis_mean": ratio, "tis_clip_frac": outside.float()}
