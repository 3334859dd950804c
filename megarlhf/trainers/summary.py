"""A step's numbers, under the names of metrics/keys.py."""

import statistics
from collections.abc import Sequence

import torch

from megarlhf.algos.losses import explained_variance
from megarlhf.config.arguments import PPOConfig
from megarlhf.data.types import Sample
from megarlhf.trainers.experience import Experience, Updates, in_loss
from megarlhf.trainers.roles import UpdateResult


def sample_metrics(scored: Sequence[Sample], usable: Sequence[Sample]) -> dict[str, float]:
    """Rewards and lengths of one step.

    Args:
        scored: every sample, those without a result too.
        usable: those with a result that can be trained on; no reward is reported without any.
    """
    rewards = torch.tensor([sample.reward for sample in usable if sample.reward is not None], dtype=torch.float64)
    lengths = [sample.response_length for sample in scored]
    moments = {}
    if len(rewards):
        moments = {"reward/mean": float(rewards.mean()), "reward/std": float(rewards.std(correction=0))}
    return moments | {
        "reward/no_result_count": float(sum(sample.reward is None for sample in scored)),
        **_parts(scored),
        "rollout/response_length_mean": statistics.fmean(lengths),
        "rollout/response_length_max": float(max(lengths)),
        "rollout/prompt_length_mean": statistics.fmean(len(sample.prompt.token_ids) for sample in scored),
        "rollout/truncated_frac": sum(sample.finish_reason == "length" for sample in scored) / len(scored),
    }


def _parts(scored: Sequence[Sample]) -> dict[str, float]:
    """What each source of the reward gave to the samples that it has a result for, and to how many it gave none."""
    metrics = {}
    for name in dict.fromkeys(name for sample in scored for name in sample.parts):
        found = [part for sample in scored if (part := sample.parts.get(name)) is not None]
        if found:
            metrics[f"reward/{name}/mean"] = statistics.fmean(found)
        metrics[f"reward/{name}/no_result_count"] = float(len(scored) - len(found))
    return metrics


def overlong_metrics(plain: Sequence[Sample], penalised: Sequence[Sample], config: PPOConfig) -> dict[str, float]:
    """Of samples with a reward, before the penalty of overlong ones and after it; nothing of what is off."""
    metrics = {}
    if config.algorithm.overlong_buffer_len is not None:
        sums = [sum(s.reward for s in samples if s.reward is not None) for samples in (plain, penalised)]
        metrics["reward/overlong_penalty"] = (sums[1] - sums[0]) / len(plain)
    if config.algorithm.overlong_filter:
        metrics["rollout/overlong_filtered"] = float(sum(not in_loss(sample, config) for sample in plain))
    return metrics


def training_metrics(experience: Experience, updates: Updates) -> dict[str, float]:
    """Advantages, KL and losses of one step that was trained."""
    advantages, returns = experience.advantages, experience.returns
    metrics = {
        "advantage/mean": float(advantages.mean()),
        "advantage/std": float(advantages.std(unbiased=False)),
        "return/mean": float(returns.mean()),
        **_role_metrics("policy", updates.actor),
        **_role_metrics("critic", updates.critic),
    }
    kl_in_loss = metrics.pop("policy/kl", None)
    if experience.kl is not None:
        metrics["kl/mean"] = float(experience.kl.mean(dtype="float64"))
    elif experience.has_reference and kl_in_loss is not None:
        metrics["kl/mean"] = kl_in_loss
    if experience.values is not None:
        variance = explained_variance(torch.from_numpy(experience.values), returns)
        if variance == variance:  # undefined (NaN) while all returns are equal
            metrics["critic/explained_variance"] = variance
    return metrics


def _role_metrics(phase: str, results: Sequence[UpdateResult]) -> dict[str, float]:
    if not results:
        return {}
    metrics = {f"{phase}/loss": _mean([r.loss for r in results])}
    for name in results[0].metrics:
        metrics[f"{phase}/{name}"] = _mean([r.metrics[name] for r in results])
    metrics[f"{phase}/grad_norm"] = _mean([r.grad_norm for r in results])
    metrics[f"{phase}/learning_rate"] = results[-1].learning_rate
    return metrics


def _mean(values: Sequence[float]) -> float:
    """Of metrics, which may have overflowed: statistics.fmean raises at infinities of both signs."""
    return sum(values) / len(values)


def speed(samples: Sequence[Sample], *, seconds: float) -> dict[str, float]:
    """Response tokens and samples over the step's wall time."""
    return {
        "perf/tokens_per_second": sum(sample.response_length for sample in samples) / seconds,
        "perf/samples_per_second": len(samples) / seconds,
        "time/step_seconds": seconds,
    }
