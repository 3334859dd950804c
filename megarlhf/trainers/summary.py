"""A step's numbers, under the names of metrics/keys.py."""

import logging
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from megarlhf.algos.losses import explained_variance
from megarlhf.data.types import Sample
from megarlhf.trainers.experience import Experience
from megarlhf.trainers.roles import UpdateResult

logger = logging.getLogger(__name__)
STOP_FACTOR = 10.0  # a log-prob difference this many times the budget ends the run


class LogProbDifferenceError(RuntimeError):
    """Trainer and inference engine disagree so much that they cannot hold the same weights."""


def step_metrics(
    scored: Sequence[Sample],
    experience: Experience,
    actor: Sequence[UpdateResult],
    critic: Sequence[UpdateResult],
    indices: Sequence[Sequence[int]],
) -> dict[str, float]:
    """Reward, KL, losses, lengths and the log-prob difference of one step.

    Args:
        scored: every sample, those without a result too.
        indices: samples of each optimizer step, in the order of `actor` and `critic`.
    """
    rewards = [sample.reward for sample in experience.samples if sample.reward is not None]
    lengths = [len(sample.response_ids) for sample in scored]
    metrics = {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "reward/no_result_count": float(sum(sample.reward is None for sample in scored)),
        "rollout/response_length_mean": statistics.fmean(lengths),
        "rollout/response_length_max": float(max(lengths)),
        "rollout/prompt_length_mean": statistics.fmean(len(sample.prompt.token_ids) for sample in scored),
        "rollout/truncated_frac": sum(sample.finish_reason == "length" for sample in scored) / len(scored),
    }
    advantages, returns = torch.cat(experience.advantages), torch.cat(experience.returns)
    metrics["advantage/mean"] = float(advantages.mean())
    metrics["advantage/std"] = float(advantages.std(unbiased=False))
    metrics["return/mean"] = float(returns.mean())
    metrics |= _role_metrics("policy", actor) | _role_metrics("critic", critic)
    kl_in_loss = metrics.pop("policy/kl", None)
    if experience.kl is not None:
        metrics["kl/mean"] = float(torch.cat(experience.kl).mean())
    elif experience.ref_log_probs is not None and kl_in_loss is not None:
        metrics["kl/mean"] = kl_in_loss
    if experience.values is not None:
        variance = explained_variance(torch.cat(experience.values), returns)
        if variance == variance:  # undefined (NaN) while all returns are equal
            metrics["critic/explained_variance"] = variance
    return metrics | _log_prob_difference(experience, actor, indices)


def _role_metrics(phase: str, results: Sequence[UpdateResult]) -> dict[str, float]:
    if not results:
        return {}
    metrics = {f"{phase}/loss": statistics.fmean(r.loss for r in results)}
    for name in results[0].metrics:
        metrics[f"{phase}/{name}"] = statistics.fmean(r.metrics[name] for r in results)
    metrics[f"{phase}/grad_norm"] = statistics.fmean(r.grad_norm for r in results)
    metrics[f"{phase}/learning_rate"] = results[-1].learning_rate
    return metrics


def _log_prob_difference(
    experience: Experience, actor: Sequence[UpdateResult], indices: Sequence[Sequence[int]]
) -> dict[str, float]:
    """|trainer - inference engine| of the same tokens under the same weights.

    From the pass before the updates where there was one, else from the forward pass of the first update.
    """
    trainer: Sequence[Tensor]
    if experience.log_probs is not None:
        samples, trainer = experience.samples, experience.log_probs
    elif actor:
        samples, trainer = [experience.samples[i] for i in indices[0]], actor[0].outputs
    else:
        return {}
    pairs = zip(trainer, samples, strict=True)
    differences = torch.cat([(own - torch.tensor(s.rollout_log_probs)).abs() for own, s in pairs])
    return {
        "rollout/logprob_diff_mean": float(differences.mean()),
        "rollout/logprob_diff_max": float(differences.max()),
    }


def check_log_prob_difference(metrics: dict[str, float], budget: float) -> None:
    """Warn when the largest difference is past the budget.

    Raises:
        LogProbDifferenceError: it is past STOP_FACTOR budgets.
    """
    largest = metrics.get("rollout/logprob_diff_max", 0.0)
    sentence = (
        f"rollout/logprob_diff_max={largest:.3g} is past logprob_diff_budget={budget}: the inference engine does not "
        "compute with the trainer's weights, or in another precision"
    )
    if largest > STOP_FACTOR * budget:
        raise LogProbDifferenceError(f"{sentence}; it is past {STOP_FACTOR:g} budgets, so the run stops")
    if largest > budget:
        logger.warning("%s", sentence)


def speed(samples: Sequence[Sample], *, seconds: float) -> dict[str, float]:
    """Response tokens and samples over the step's wall time."""
    return {
        "perf/tokens_per_second": sum(len(s.response_ids) for s in samples) / seconds,
        "perf/samples_per_second": len(samples) / seconds,
        "time/step_seconds": seconds,
    }
