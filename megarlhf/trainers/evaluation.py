"""Evaluation: what the policy answers to held-out prompts, and how often that is right."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from megarlhf.algos.pass_at_k import pass_at_k, reported_k
from megarlhf.config.evaluation_arguments import EvaluationArguments
from megarlhf.data.types import Prompt, Sample
from megarlhf.trainers.roles import Phases, RewardRole, RolloutRole

CORRECT_REWARD = 1.0  # a response counts as correct from this reward on
EvaluationSets = Mapping[str, Sequence[Prompt]]  # by name; a single one may be called ""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One set's responses with their rewards, those of a prompt behind one another."""

    greedy: list[Sample]
    sampled: list[Sample]  # eval_n_samples_per_prompt of each prompt


def evaluation_is_due(step: int, interval: int | None, *, epochs: tuple[float, float]) -> bool:
    """After so many steps, or without an interval where an epoch ends.

    Args:
        epochs: passes over the data before the step and after it.
    """
    if interval is None:
        return int(epochs[1]) > int(epochs[0])
    return step % interval == 0


def answer(
    rollout: RolloutRole,
    reward: RewardRole,
    sets: EvaluationSets,
    options: EvaluationArguments,
    *,
    generating: AbstractContextManager[None],
    scoring: AbstractContextManager[None],
) -> dict[str, Answers]:
    """Each set's prompts answered and scored, all sets together; the contexts are entered while that goes on."""
    prompts = [prompt for members in sets.values() for prompt in members]
    number = options.eval_n_samples_per_prompt
    with generating:
        rollouts = [rollout.answer(prompts, n_samples=1, temperature=0.0)]
        if number:
            rollouts.append(rollout.answer(prompts, n_samples=number, temperature=options.eval_temperature))
    with scoring:
        greedy, sampled = reward.score(rollouts[0]), reward.score(rollouts[1]) if number else []
    found, first = {}, 0
    for name, members in sets.items():
        last = first + len(members)
        found[name] = Answers(greedy=greedy[first:last], sampled=sampled[first * number : last * number])
        first = last
    return found


def evaluate(
    phases: Phases, rollout: RolloutRole, reward: RewardRole, sets: EvaluationSets, options: EvaluationArguments
) -> dict[str, float]:
    """Metrics of `answer`; none without sets."""
    if not sets:
        return {}
    phase = {"generating": phases.evaluate(), "scoring": phases.judge()}
    return answers_metrics(answer(rollout, reward, sets, options, **phase))


def answers_metrics(answers: Mapping[str, Answers]) -> dict[str, float]:
    """eval/NAME/KEY of each set; and eval/KEY, the mean over the sets that have it, or the sum of counts."""
    by_set = {name: _of_set(found) for name, found in answers.items()}
    metrics = {f"eval/{name}/{key}": value for name, own in by_set.items() if name for key, value in own.items()}
    for key in dict.fromkeys(key for own in by_set.values() for key in own):
        values = [own[key] for own in by_set.values() if key in own]
        metrics[f"eval/{key}"] = sum(values) if key.endswith("_count") else statistics.fmean(values)
    return metrics


def metric_names(sets: Iterable[str], options: EvaluationArguments) -> list[str]:
    """What an evaluation of these sets may report."""
    ks = reported_k(options.eval_n_samples_per_prompt)
    keys = ["accuracy", "reward_mean", "response_length_mean", "no_result_count", *(f"pass@{k}" for k in ks)]
    return [f"eval/{prefix}{key}" for prefix in ("", *(f"{name}/" for name in sets if name)) for key in keys]


def _of_set(answers: Answers) -> dict[str, float]:
    """Responses without a result are left out and counted."""
    rewards = [sample.reward for sample in answers.greedy if sample.reward is not None]
    lost = sum(sample.reward is None for sample in (*answers.greedy, *answers.sampled))
    metrics = {
        "response_length_mean": statistics.fmean(sample.response_length for sample in answers.greedy),
        "no_result_count": float(lost),
    }
    if rewards:
        metrics["reward_mean"] = statistics.fmean(rewards)
    judged = [reward for sample in answers.greedy if (reward := _judged(sample)) is not None]
    if judged:
        metrics["accuracy"] = statistics.fmean(reward >= CORRECT_REWARD for reward in judged)
    groups = {sample.group_id: [0, 0] for sample in answers.sampled}  # of a prompt: correct ones, and those of a result
    for sample in answers.sampled:
        if (reward := _judged(sample)) is not None:
            groups[sample.group_id][0] += reward >= CORRECT_REWARD
            groups[sample.group_id][1] += 1
    correct, counts = [group[0] for group in groups.values()], [group[1] for group in groups.values()]
    for k in reported_k(len(answers.sampled) // len(answers.greedy)):
        value = pass_at_k(correct, counts, k=k)
        if value is not None:
            metrics[f"pass@{k}"] = value
    return metrics


def _judged(sample: Sample) -> float | None:
    """What says whether a response is right: its reward by rule and function where one of these scores it, else all of
    it; None without a result, and where reward models, whose scale is their own, score alone."""
    own = [part for name, part in sample.parts.items() if name in ("function", "rule")]
    if own:
        return sum(part for part in own if part is not None) if None not in own else None
    return None if any(name.startswith("reward_model") for name in sample.parts) else sample.reward
