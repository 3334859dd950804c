"""Evaluation: what the policy answers to held-out prompts, and how often that is right."""

import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from megarlhf.algos.pass_at_k import pass_at_k, reported_k
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.reward_arguments import RewardArguments
from megarlhf.data.types import Prompt, Sample
from megarlhf.trainers.roles import Phases, RewardRole, RolloutRole

logger = logging.getLogger(__name__)

CORRECT_REWARD = 1.0  # a response counts as correct from this reward by rule and function on
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
    config: PPOConfig,
    *,
    generating: Callable[[], AbstractContextManager[None]],
    scoring: Callable[[], AbstractContextManager[None]],
    kept: Callable[[Sample], Sample] = lambda sample: sample,
) -> dict[str, Answers]:
    """Each set's prompts answered and scored, `evaluated_prompts` of all sets at a time, whose tokens then go.

    Args:
        generating: a context that is entered while responses are generated, once for each part; scoring likewise.
        kept: makes of a sample that is scored what stays of it.
    """
    number, temperature = config.evaluation.eval_n_samples_per_prompt, config.evaluation.eval_temperature

    def scored(prompts: Sequence[Prompt]) -> tuple[list[Sample], list[Sample]]:
        with generating():
            greedy = rollout.answer(prompts, n_samples=1, temperature=0.0)
            sampled = rollout.answer(prompts, n_samples=number, temperature=temperature) if number else None
        with scoring():
            return reward.score(greedy), reward.score(sampled) if sampled else []

    found = {name: Answers(greedy=[], sampled=[]) for name in sets}
    named = [(found[name], prompt) for name, members in sets.items() for prompt in members]
    for first in range(0, len(named), config.evaluated_prompts):
        part = named[first : first + config.evaluated_prompts]
        greedy, sampled = scored([prompt for _, prompt in part])
        for place, (answers, _) in enumerate(part):
            answers.greedy.append(kept(greedy[place]))
            answers.sampled.extend(map(kept, sampled[place * number : (place + 1) * number]))
    return found


def evaluate(
    phases: Phases, rollout: RolloutRole, reward: RewardRole, sets: EvaluationSets, config: PPOConfig
) -> dict[str, float]:
    """Metrics of `answer`; none without sets."""
    if not sets:
        return {}

    def without_text(sample: Sample) -> Sample:
        return replace(sample, response_text="", stop_text="")

    phase = {"generating": phases.evaluate, "scoring": phases.judge}
    return answers_metrics(answer(rollout, reward, sets, config, **phase, kept=without_text), config)


def answers_metrics(answers: Mapping[str, Answers], config: PPOConfig) -> dict[str, float]:
    """eval/NAME/KEY of each set; and eval/KEY, the mean over the sets, if all have it, or the sum of counts.

    What too few responses of a set have a result for is left out, and a line says so.
    """
    by_set = {name: _of_set(found, config.reward) for name, found in answers.items()}
    metrics = {f"eval/{name}/{key}": value for name, own in by_set.items() if name for key, value in own.items()}
    for key in dict.fromkeys(key for own in by_set.values() for key in own):
        values = [own[key] for own in by_set.values() if key in own]
        if len(values) == len(by_set):
            metrics[f"eval/{key}"] = sum(values) if key.endswith("_count") else statistics.fmean(values)
    if missing := [name for name in metric_names(answers, config) if name not in metrics]:
        logger.warning(
            "%d of %d responses have no result: there is no %s (min_result_fraction=%g, max_no_result_fraction=%s)",
            metrics["eval/no_result_count"],
            sum(len(found.greedy) + len(found.sampled) for found in answers.values()),
            ", ".join(missing),
            config.reward.min_result_fraction,
            config.reward.max_no_result_fraction,
        )
    return metrics


def metric_names(sets: Iterable[str], config: PPOConfig) -> list[str]:
    """What an evaluation of these sets reports where enough responses have a result."""
    keys = ["reward_mean", "response_length_mean", "no_result_count"]
    if config.reward.judges:
        keys = ["accuracy", *keys, *(f"pass@{k}" for k in reported_k(config.evaluation.eval_n_samples_per_prompt))]
    return [f"eval/{prefix}{key}" for prefix in ("", *(f"{name}/" for name in sets if name)) for key in keys]


def greedy_metrics(
    rewards: Sequence[float | None], parts: Sequence[Mapping[str, float | None]], limits: RewardArguments
) -> dict[str, float]:
    """Of each prompt's one response: reward_mean and accuracy, as far as enough of them have a result.

    Args:
        parts: what the sources say of each response, by their names.
    """
    found = {}
    if known := _enough(rewards, limits):
        found["reward_mean"] = statistics.fmean(known)
    if judged := _enough(list(map(_judged, parts)), limits):
        found["accuracy"] = statistics.fmean(reward >= CORRECT_REWARD for reward in judged)
    return found


def _of_set(answers: Answers, limits: RewardArguments) -> dict[str, float]:
    """Responses without a result are left out and counted."""
    greedy, sampled = answers.greedy, answers.sampled
    metrics = {
        "response_length_mean": statistics.fmean(sample.response_length for sample in greedy),
        "no_result_count": float(sum(sample.reward is None for sample in (*greedy, *sampled))),
    }
    metrics |= greedy_metrics([sample.reward for sample in greedy], [sample.parts for sample in greedy], limits)
    judged, number = [_judged(sample.parts) for sample in sampled], len(sampled) // len(greedy)
    if _enough(judged, limits):
        groups = [judged[first : first + number] for first in range(0, len(judged), number)]
        counts = [sum(reward is not None for reward in group) for group in groups]
        correct = [sum(reward is not None and reward >= CORRECT_REWARD for reward in group) for group in groups]
        for k in reported_k(number):
            value = pass_at_k(correct, counts, k=k)
            if value is not None:
                metrics[f"pass@{k}"] = value
    return metrics


def _enough(values: Sequence[float | None], limits: RewardArguments) -> list[float]:
    """Those that are there; none where they are too few of all."""
    known = [value for value in values if value is not None]
    return known if known and limits.allows(len(values) - len(known), of=len(values)) else []


def _judged(parts: Mapping[str, float | None]) -> float | None:
    """What says whether a response is right: its reward by rule and function. Models and servers have scales of their
    own, and say nothing of it."""
    own = [parts[name] for name in ("function", "rule") if name in parts]
    known = [reward for reward in own if reward is not None]
    return sum(known) if known and len(known) == len(own) else None
