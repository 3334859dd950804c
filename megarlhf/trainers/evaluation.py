"""Greedy answers to held-out prompts."""

from collections.abc import Sequence

from megarlhf.data.types import Prompt, Sample
from megarlhf.trainers.roles import Roles

CORRECT_REWARD = 1.0  # a greedy response counts as correct from this reward on


def evaluate(roles: Roles, prompts: Sequence[Prompt] | None) -> dict[str, float]:
    """Greedy accuracy on held-out prompts: the fraction whose response earns CORRECT_REWARD or more.

    Responses without a result are left out and counted; nothing is reported without prompts.
    """
    if not prompts:
        return {}
    with roles.phases.evaluate():
        scored: list[Sample] = roles.reward.score(roles.rollout.generate_greedy(prompts))
    rewards = [sample.reward for sample in scored if sample.reward is not None]
    metrics = {
        "eval/response_length_mean": sum(sample.response_length for sample in scored) / len(scored),
        "eval/no_result_count": float(len(scored) - len(rewards)),
    }
    if rewards:
        metrics["eval/accuracy"] = sum(reward >= CORRECT_REWARD for reward in rewards) / len(rewards)
    return metrics
