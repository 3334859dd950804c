"""The samples of a step: prompts drawn, answered and scored, once or, with dynamic filtering, in rounds."""

import logging
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from megarlhf.config.algorithm_arguments import AlgorithmArguments
from megarlhf.config.arguments import PPOConfig
from megarlhf.data.sampling import drawn_rows
from megarlhf.data.types import Prompt, Rollout, Sample
from megarlhf.trainers.experience import ForwardPasses, check_results
from megarlhf.trainers.roles import Roles
from megarlhf.trainers.side_by_side import side_by_side
from megarlhf.trainers.state import LoopState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What was generated for a step, scored."""

    samples: list[Sample]  # all of it
    rollout: Rollout  # the groups to train on
    consumed: int  # prompts drawn up to this step and with it
    passes: ForwardPasses | None = None  # of all samples, where they were made while these were scored
    metrics: dict[str, float] = field(default_factory=dict)


def collect(config: PPOConfig, roles: Roles, prompts: Sequence[Prompt], state: LoopState) -> Collected:
    """Responses to rollout_batch_size prompts, with their rewards: the phases rollout and reward.

    With dynamic_filtering, DAPO's dynamic sampling (arXiv:2503.14476 section 3.2), groups that teach nothing are
    replaced by fresh prompts, in up to dynamic_filtering_max_rounds rounds, each of as many prompts as should be enough
    by the rounds before it. A prompt's place among all of the step's is that of its seeds, so no round repeats one.

    Raises:
        NoSamplesError: the reward fails.
        RuntimeError: samples of other weights than the step's.
    """
    algorithm, wanted = config.algorithm, config.batch.rollout_batch_size
    most = algorithm.dynamic_filtering_max_rounds if algorithm.dynamic_filtering else 1
    samples: list[Sample] = []
    tokens: list[Any] = []  # by group; None where it is not trained on
    kept: list[int] = []
    rounds, passes = 0, None
    while len(kept) < wanted and rounds < most:
        first, missing, rounds = len(tokens), wanted - len(kept), rounds + 1
        count = min(wanted, -(-missing * first // max(1, len(kept)))) if first else wanted
        scored, passes = _round(
            config, roles, prompts, state, first_place=first, count=count, is_last=rounds == most
        )
        teaching = _teaching(scored.samples, algorithm)
        kept += [first + group for group in teaching]
        tokens += [one if group in teaching else None for group, one in enumerate(scored.tokens)]
        samples += [replace(s, group_id=first + s.group_id) for s in scored.samples] if first else scored.samples
    trained = set(kept[:wanted])
    rollout = Rollout(
        samples=[sample for sample in samples if sample.group_id in trained],
        tokens=tuple(one if group in trained else None for group, one in enumerate(tokens)),
    )
    metrics: dict[str, float] = {}
    if algorithm.dynamic_filtering:
        counts = {"filter_rounds": rounds, "filtered_groups": len(tokens) - len(kept)}
        counts["surplus_groups"] = len(kept) - len(trained)
        metrics = {f"rollout/{name}": float(count) for name, count in counts.items()}
        if len(trained) < wanted:
            logger.warning(
                "step %d: dynamic_filtering found %d of %d groups in dynamic_filtering_max_rounds=%d rounds of %d "
                "prompts together; it goes on with these",
                *(state.step + 1, len(trained), wanted, most, len(tokens)),
            )
    consumed = state.consumed_prompts + len(tokens)
    return Collected(samples=samples, rollout=rollout, consumed=consumed, passes=passes, metrics=metrics)


def _round(
    config: PPOConfig,
    roles: Roles,
    prompts: Sequence[Prompt],
    state: LoopState,
    *,
    first_place: int,
    count: int,
    is_last: bool,
) -> tuple[Rollout, ForwardPasses | None]:
    """The next `count` prompts behind those of earlier rounds, answered and scored.

    Where devices are the roles' own, training roles run their forward passes while responses are scored. Not with
    dynamic filtering, which drops most of what it would be of, nor in FP8, whose scales remember every pass.
    """
    step, start = state.step + 1, state.consumed_prompts + first_place
    chosen = [prompts[i] for i in drawn_rows(len(prompts), config.model.seed, start, start + count)]
    with roles.phases.rollout():
        generated = of_version(roles.rollout.generate(chosen, step=step, first_place=first_place), state.step)
    passes = None
    if roles.side_by_side and not (config.algorithm.dynamic_filtering or config.precision.any_fp8):
        passes = ForwardPasses(generated, roles.actor, roles.critic, config, step=step)
    with side_by_side(passes.calls() if passes is not None and passes.mini_batches else [], roles) as wait:
        with roles.phases.reward(is_last=is_last):
            scored = replace(generated, samples=roles.reward.score(generated))
        with roles.phases.experience() if passes is not None else nullcontext():
            wait()
    check_results(scored.samples, config, step=step)
    return scored, passes


def _teaching(samples: Sequence[Sample], algorithm: AlgorithmArguments) -> dict[int, None]:
    """Groups that the filter keeps, in their order: all, those of rewards that differ, or of a mean in the range."""
    groups: dict[int, list[float]] = {}
    for sample in samples:
        results = groups.setdefault(sample.group_id, [])
        results += [] if sample.reward is None else [sample.reward]
    if not algorithm.dynamic_filtering:
        return dict.fromkeys(groups)
    if algorithm.dynamic_filtering_reward_range is None:
        return dict.fromkeys(group for group, results in groups.items() if len(set(results)) > 1)
    low, high = algorithm.dynamic_filtering_reward_range
    means = {group: statistics.fmean(results) for group, results in groups.items() if results}
    return dict.fromkeys(group for group, mean in means.items() if low < mean < high)


def of_version(rollout: Rollout, version: int) -> Rollout:
    """The samples, all generated by the weights of `version`.

    Raises:
        RuntimeError: some were not.
    """
    others = sorted({sample.weight_version for sample in rollout.samples} - {version})
    if others:
        raise RuntimeError(f"samples of weight versions {others} where the engines should have version {version}")
    return rollout
