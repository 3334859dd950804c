"""From scored samples to what the updates need: log-probs, values, KL, advantages, weighted rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import torch
from torch import Tensor

from megarlhf.algos.advantages import compute_advantages
from megarlhf.algos.kl import kl_estimate
from megarlhf.algos.losses import Aggregation, token_weights
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.check_numbers import GROUP_ESTIMATORS
from megarlhf.data.types import Sample, TrainingRow
from megarlhf.trainers.roles import ActorRole, CriticRole, UpdateResult
from megarlhf.trainers.state import LoopState


@dataclass(frozen=True, kw_only=True)
class Experience:
    """One rollout batch, ready to train on. Lists have one entry per sample, tensors one number per response token."""

    samples: list[Sample]
    log_probs: list[Tensor] | None  # under the policy before the updates; None: the single update computes them
    ref_log_probs: list[Tensor] | None
    values: list[Tensor] | None
    kl: list[Tensor] | None  # estimate per token, where log_probs and ref_log_probs are known
    advantages: list[Tensor]
    returns: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Updates:
    """Results of a step's optimizer steps, and which samples each took."""

    actor: list[UpdateResult] = field(default_factory=list)
    critic: list[UpdateResult] = field(default_factory=list)
    indices: list[list[int]] = field(default_factory=list)


class NoSamplesError(RuntimeError):
    """The reward gives too few results to go on."""


def needs_old_log_probs(config: PPOConfig) -> bool:
    """Whether a pass before the updates must compute the policy's log-probs.

    Not where one update uses every sample once and the KL is part of the loss: its own forward pass gives them.
    """
    algorithm = config.algorithm
    return config.batch.updates_per_step > 1 or (algorithm.init_kl_coef > 0 and not algorithm.use_kl_loss)


def with_result(samples: Sequence[Sample], *, estimator: str) -> list[Sample]:
    """Samples to train on: those with a reward and, for group estimators, with a second one in their group."""
    scored = [sample for sample in samples if sample.reward is not None]
    if estimator in GROUP_ESTIMATORS:
        counts: dict[int, int] = {}
        for sample in scored:
            counts[sample.group_id] = counts.get(sample.group_id, 0) + 1
        scored = [sample for sample in scored if counts[sample.group_id] > 1]
    return scored


def enough_results(usable: int, generated: int, least_fraction: float) -> bool:
    """Whether a step is trained: with at least this fraction of its samples, and at least one."""
    return usable > 0 and usable >= least_fraction * generated


def check_rewards(state: LoopState, scored: Sequence[Sample], config: PPOConfig) -> None:
    """End a run whose reward does not work.

    Raises:
        NoSamplesError: max_untrained_steps steps in a row were not trained.
    """
    limit = config.reward.max_untrained_steps
    if state.untrained_in_a_row >= limit:
        missing = sum(sample.reward is None for sample in scored)
        raise NoSamplesError(
            f"{limit} steps in a row had too few rewards to train on (max_untrained_steps={limit}, "
            f"min_result_fraction={config.reward.min_result_fraction}); in step {state.step} the reward gave no result "
            f"for {missing} of {len(scored)} samples: see its errors in the log"
        )


def to_rows(samples: Sequence[Sample]) -> list[TrainingRow]:
    """Rows without fields, for forward passes."""
    return [
        TrainingRow(
            input_ids=(*s.prompt.token_ids, *s.response_ids),
            prompt_length=len(s.prompt.token_ids),
            group_id=s.group_id,
        )
        for s in samples
    ]


def make_experience(
    samples: list[Sample],
    actor: ActorRole,
    critic: CriticRole | None,
    config: PPOConfig,
    *,
    kl_coef: float,
    reward_scale: tuple[float, float] = (0.0, 1.0),
) -> Experience:
    """Run the forward passes that the estimator needs and compute advantages.

    Args:
        samples: with rewards.
        kl_coef: present coefficient of the KL penalty.
        reward_scale: (shift, scale): rewards enter as (reward - shift) / scale.
    """
    algorithm = config.algorithm
    rows = to_rows(samples)
    log_probs = actor.log_probs(rows) if needs_old_log_probs(config) else None
    ref_log_probs = actor.ref_log_probs(rows) if algorithm.init_kl_coef > 0 else None
    values = critic.values(rows) if critic is not None else None
    kl = None
    if log_probs is not None and ref_log_probs is not None:
        pairs = zip(log_probs, ref_log_probs, strict=True)
        kl = [kl_estimate(own, ref, estimator=algorithm.kl_estimator) for own, ref in pairs]
    shift, scale = reward_scale
    rewards = torch.tensor([(sample.reward - shift) / scale for sample in samples if sample.reward is not None])
    result = compute_advantages(
        algorithm.advantage_estimator,
        rewards=rewards,
        group_ids=torch.tensor([sample.group_id for sample in samples]),
        kl=None if algorithm.use_kl_loss else kl,
        lengths=[len(sample.response_ids) for sample in samples],
        values=values,
        kl_coef=0.0 if algorithm.use_kl_loss else kl_coef,
        gamma=algorithm.gamma,
        lambd=algorithm.lambd,
        clip_range=algorithm.reward_clip_range,
        normalize=algorithm.normalize_advantages,
    )
    return Experience(
        samples=samples,
        log_probs=log_probs,
        ref_log_probs=ref_log_probs,
        values=values,
        kl=kl,
        advantages=result.advantages,
        returns=result.returns,
    )


def mini_batches(experience: Experience, config: PPOConfig, *, step: int) -> Iterator[list[int]]:
    """Sample indices of each optimizer step: max_epochs shuffles, each dealt into equal parts.

    A part has about global_batch_size samples: where samples are left without a reward there are fewer parts, in
    proportion. The samples of one prompt stay together where a part holds whole groups.
    """
    batch = config.batch
    parts = max(1, round(len(experience.samples) / batch.global_batch_size))
    whole_groups = batch.global_batch_size % batch.n_samples_per_prompt == 0
    units: dict[int, list[int]] = {}
    for index, sample in enumerate(experience.samples):
        units.setdefault(sample.group_id if whole_groups else index, []).append(index)
    random = Random(f"{config.model.seed}-{step}")
    for _ in range(batch.max_epochs):
        order = list(units)
        if parts > 1:
            random.shuffle(order)
        for part in range(parts):
            first, last = len(order) * part // parts, len(order) * (part + 1) // parts
            chosen = [index for unit in order[first:last] for index in units[unit]]
            if chosen:
                yield chosen


def training_rows(
    experience: Experience, indices: Sequence[int], config: PPOConfig, *, critic: bool
) -> tuple[list[TrainingRow], float]:
    """Rows of one optimizer step with the fields of the actor's or the critic's loss, and their denominator.

    Dr. GRPO's denominator is the longest response that may be generated.
    """
    algorithm = config.algorithm
    samples = [experience.samples[i] for i in indices]
    aggregation: Aggregation = algorithm.critic_loss_aggregation if critic else algorithm.loss_aggregation
    if algorithm.advantage_estimator == "dr_grpo":
        aggregation = "constant"
    weights, denominator = token_weights(
        [len(s.response_ids) for s in samples],
        aggregation=aggregation,
        max_length=config.rollout.generate_max_len if aggregation == "constant" else None,
    )
    columns: dict[str, list[Tensor] | None]
    if critic:
        columns = {"old_values": experience.values, "returns": experience.returns}
    else:
        columns = {"advantages": experience.advantages, "old_log_probs": experience.log_probs}
        if algorithm.use_kl_loss:
            columns["ref_log_probs"] = experience.ref_log_probs
    rows = []
    for row, index, weight in zip(to_rows(samples), indices, weights, strict=True):
        fields = {name: column[index] for name, column in columns.items() if column is not None}
        rows.append(replace(row, fields=fields | {"weights": weight}))
    return rows, denominator
