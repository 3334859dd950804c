"""Trainer and inference engines on the same tokens: budgets of their difference, and what leaves FP8 past them.

The training roles guard their own passes (engine/precision.py); this is what only the loop can see. Engines leave FP8
by a restart.
"""

import logging
from collections.abc import Mapping

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.precision import EnginePhase, wide_dtype
from megarlhf.trainers.roles import ActorRole, LogProbDifference, Roles
from megarlhf.trainers.state import LoopState

logger = logging.getLogger(__name__)
FOR_GOOD = -1  # steps outside of FP8
STOP_FACTOR = 10.0  # a log-prob difference this many times the budget ends the run


class LogProbDifferenceError(RuntimeError):
    """Trainer and inference engine disagree so much that they cannot hold the same weights."""


def log_prob_metrics(difference: LogProbDifference) -> dict[str, float]:
    """Means over tokens, and the largest."""
    return {
        "rollout/logprob_diff_mean": difference.absolute / difference.num_tokens,
        "rollout/logprob_kl": difference.kl / difference.num_tokens,
        "rollout/logprob_diff_max": difference.largest,
    }


def past_budget(found: Mapping[str, float], config: PPOConfig) -> list[str]:
    """Which means are past their budget, in words."""
    return [
        _past(name, found, option, budget)
        for name, (option, budget) in _budgets(config).items()
        if not found[name] <= budget and name != "rollout/logprob_diff_max"  # NaN too
    ]


def _budgets(config: PPOConfig) -> dict[str, tuple[str, float]]:
    """Option and budget by metric; in float32 of the largest difference too."""
    rollout, exact = config.rollout, config.precision.is_fp32(bf16=config.model.bf16)
    limits = {
        "rollout/logprob_diff_mean": ("logprob_diff_budget", rollout.logprob_diff_budget),
        "rollout/logprob_kl": ("logprob_kl_budget", rollout.logprob_kl_budget),
    }
    return limits | ({"rollout/logprob_diff_max": limits["rollout/logprob_diff_mean"]} if exact else {})


def _past(name: str, found: Mapping[str, float], option: str, budget: float) -> str:
    return (
        f"{name}={found[name]:.3g} is past {option}={budget}: the inference engine does not compute with the "
        "trainer's weights, or in another precision"
    )


def check_log_prob_difference(difference: LogProbDifference, config: PPOConfig) -> dict[str, float]:
    """Trainer and inference engine on the same tokens under the same weights; past a budget it warns.

    The mean |difference| and the KL have budgets. Of 10^7 tokens in bfloat16 the largest difference is far in the tail,
    past 1 nat in runs that learn, and is only reported; in float32 it stays with rounding.

    Raises:
        LogProbDifferenceError: one is past STOP_FACTOR budgets, or not a number.
    """
    found = log_prob_metrics(difference)
    for name, (option, budget) in _budgets(config).items():
        if not found[name] <= STOP_FACTOR * budget:  # NaN too
            said = _past(name, found, option, budget)
            raise LogProbDifferenceError(f"{said}; it is past {STOP_FACTOR:g} budgets, so the run stops")
    for sentence in past_budget(found, config):
        logger.warning("%s", sentence)
    return found


def trainer_leaves_fp8(difference: LogProbDifference, config: PPOConfig, actor: ActorRole, phase: EnginePhase) -> bool:
    """Whether the phase whose log-probs are past a budget has left FP8 for it just now."""
    sentences = past_budget(log_prob_metrics(difference), config)
    return bool(sentences) and config.precision.uses_fp8(phase) and actor.fall_back(phase, sentences[0])


def judge_log_probs(
    difference: LogProbDifference, config: PPOConfig, state: LoopState, actor: ActorRole, phase: EnginePhase
) -> dict[str, float]:
    """Metrics of the difference. Past a budget a phase in FP8 leaves it, the trainer's before the engines'.

    Where none is left in FP8 the run warns or stops; see check_log_prob_difference.
    """
    if trainer_leaves_fp8(difference, config, actor, phase):
        return log_prob_metrics(difference)
    sentences = past_budget(log_prob_metrics(difference), config)
    if sentences and config.rollout_dtype == "fp8" and state.rollout_steps_left == 0:
        steps, wide = config.precision.fp8_fallback_steps, wide_dtype(bf16=config.model.bf16)
        state.rollout_steps_left, state.rollout_fallbacks = steps or FOR_GOOD, state.rollout_fallbacks + 1
        until = f"for {steps} steps" if steps else "for the rest of the run"
        logger.warning("rollout leaves fp8 for %s %s (fp8_fallback_steps=%d): %s", wide, until, steps, sentences[0])
        return log_prob_metrics(difference)
    return check_log_prob_difference(difference, config)


def begin_step(config: PPOConfig, state: LoopState) -> None:
    """Count down the steps that the engines are outside of FP8."""
    if state.rollout_steps_left > 0:
        state.rollout_steps_left -= 1
        if state.rollout_steps_left == 0:
            logger.warning("rollout computes in fp8 again after this step, fp8_fallback_steps are over")


def report(config: PPOConfig, roles: Roles, state: LoopState) -> dict[str, float]:
    """Metrics of every phase that is meant to compute in FP8; what the training roles have to say is logged."""
    metrics: dict[str, float] = {}
    trained = {"": roles.actor, "critic_": roles.critic} if config.precision.any_fp8 else {}
    for prefix, role in trained.items():
        if role is not None:
            found, said = role.precision_report()
            metrics |= {f"precision/{prefix}{key}": value for key, value in found.items()}
            for sentence in said:
                logger.warning("%s%s", prefix, sentence)
    if config.rollout_dtype == "fp8":
        metrics["precision/rollout/fp8"] = float(roles.rollout.in_fp8)
        metrics["precision/rollout/fallbacks"] = float(state.rollout_fallbacks)
    return metrics


def set_rollout(config: PPOConfig, roles: Roles, state: LoopState) -> None:
    """Before a sync: let the engines compute in what the next rollout is to compute in."""
    wanted = config.rollout_dtype == "fp8" and state.rollout_steps_left == 0
    if wanted != roles.rollout.in_fp8:
        with roles.phases.restart():
            roles.rollout.set_fp8(wanted)
