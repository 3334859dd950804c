"""From scored samples to what the updates need: log-probs, values, KL, advantages, weights."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

import torch
from torch import Tensor

from megarlhf.algos.advantages import compute_advantages
from megarlhf.algos.losses import Aggregation, token_weights
from megarlhf.algos.overlong import overlong_penalties
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.check_numbers import GROUP_ESTIMATORS
from megarlhf.data.types import Floats, Rollout, Sample
from megarlhf.trainers.precision import trainer_leaves_fp8
from megarlhf.trainers.roles import ActorRole, CriticRole, LogProbDifference, Roles, UpdateResult
from megarlhf.trainers.side_by_side import side_by_side
from megarlhf.trainers.state import LoopState


@dataclass(frozen=True, kw_only=True)
class Experience:
    """One rollout batch, ready to train on.

    Arrays and tensors have one number for each response token, in the order of the samples.
    """

    actor_denominators: list[float]  # of the loss, of each optimizer step of an epoch
    critic_denominators: list[float]
    difference: LogProbDifference | None  # None: the first update measures it
    has_reference: bool
    values: Floats | None
    kl: Floats | None  # estimate, where the policy's log-probs before the updates and the reference's are known
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True, kw_only=True)
class Updates:
    """Results of a step's optimizer steps."""

    actor: list[UpdateResult] = field(default_factory=list)
    critic: list[UpdateResult] = field(default_factory=list)


class NoSamplesError(RuntimeError):
    """The reward gives too few results to go on."""


def with_result(samples: Sequence[Sample], *, estimator: str) -> list[Sample]:
    """Samples to train on: those with a reward and, for group estimators, with a second one in their group."""
    scored = [sample for sample in samples if sample.reward is not None]
    if estimator in GROUP_ESTIMATORS:
        counts = Counter(sample.group_id for sample in scored)
        scored = [sample for sample in scored if counts[sample.group_id] > 1]
    return scored


def in_loss(sample: Sample, config: PPOConfig) -> bool:
    """Whether the losses look at a sample: not at what was cut, with overlong_filter."""
    return not (config.algorithm.overlong_filter and sample.finish_reason == "length")


def penalised(samples: Sequence[Sample], config: PPOConfig) -> list[Sample]:
    """Samples, all with a reward, with the penalty of overlong ones in it."""
    algorithm = config.algorithm
    if algorithm.overlong_buffer_len is None:
        return list(samples)
    penalties = overlong_penalties(
        [sample.response_length for sample in samples],
        max_length=config.rollout.generate_max_len,
        buffer=algorithm.overlong_buffer_len,
        factor=algorithm.overlong_penalty_factor,
    )
    pairs = zip(samples, penalties, strict=True)
    return [replace(s, reward=s.reward + penalty) for s, penalty in pairs if s.reward is not None]


def enough_results(usable: int, generated: int, least_fraction: float) -> bool:
    """Whether a step is trained: with at least this fraction of its samples, and at least one."""
    return usable > 0 and usable >= least_fraction * generated


def check_results(scored: Sequence[Sample], config: PPOConfig, *, step: int) -> None:
    """Stop before a step is trained on what a reward that fails has left of it.

    Raises:
        NoSamplesError: more than max_no_result_fraction of its samples have no result.
    """
    limit = config.reward.max_no_result_fraction
    missing = sum(sample.reward is None for sample in scored)
    if limit is not None and missing > limit * len(scored):
        lost = [name for sample in scored for name, part in sample.parts.items() if part is None and "/" not in name]
        sources = ", ".join(f"{name} for {count}" for name, count in Counter(lost).items())
        raise NoSamplesError(
            f"in step {step}, which is not trained, the reward gave no result for {missing} of {len(scored)} samples "
            f"({sources}); max_no_result_fraction={limit:g} allows {int(limit * len(scored))}: the log says why"
        )


def check_rewards(state: LoopState, metrics: Mapping[str, float], config: PPOConfig) -> None:
    """End a run whose reward does not work.

    Args:
        metrics: of the last finished step.

    Raises:
        NoSamplesError: max_untrained_steps steps in a row were not trained.
    """
    limit = config.reward.max_untrained_steps
    if state.untrained_in_a_row >= limit:
        raise NoSamplesError(
            f"{limit} steps in a row had too few rewards to train on (max_untrained_steps={limit}, "
            f"min_result_fraction={config.reward.min_result_fraction}); in step {state.step} the reward gave no result "
            f"for {metrics['reward/no_result_count']:.0f} samples{_left_out(config)}: see its errors in the log"
        )


def _left_out(config: PPOConfig) -> str:
    """Which filters may have left samples out."""
    names = [name for name in ("dynamic_filtering", "overlong_filter") if getattr(config.algorithm, name)]
    return f", and {' and '.join(names)} left others out" if names else ""


class ForwardPasses:
    """What the estimator needs of the training roles, of the samples that the losses look at.

    Attributes:
        difference, kl, values: as in Experience, once the calls are made.
    """

    def __init__(
        self, rollout: Rollout, actor: ActorRole, critic: CriticRole | None, config: PPOConfig, *, step: int
    ) -> None:
        samples = [sample for sample in rollout.samples if in_loss(sample, config)]
        self._rollout, self._config = replace(rollout, samples=samples), config
        self.mini_batches = split_mini_batches(samples, config, step=step)
        self._actor, self._critic = actor, critic
        self.difference: LogProbDifference | None = None
        self.kl: Floats | None = None
        self.values: Floats | None = None

    def calls(self) -> list[Callable[[], None]]:
        """One for each role; they may be made side by side, before the samples have rewards."""
        return [self._run_actor] + ([] if self._critic is None else [partial(self._run_critic, self._critic)])

    def are_of(self, samples: Sequence[Sample]) -> bool:
        """Whether these are what the losses look at of samples."""
        kept = [sample for sample in samples if in_loss(sample, self._config)]
        return list(map(_names, kept)) == list(map(_names, self._rollout.samples))

    def _run_actor(self) -> None:
        actor = self._actor
        actor.begin(self._rollout, self.mini_batches)
        difference = None if self._config.is_one_pass else actor.log_probs()
        if difference is not None and trainer_leaves_fp8(difference, self._config, actor, "log_prob"):
            difference = actor.log_probs()
        if self._config.algorithm.init_kl_coef > 0:
            actor.ref_log_probs()
            self.kl = None if difference is None else actor.kl(self._config.algorithm.kl_estimator)
        self.difference = difference

    def _run_critic(self, critic: CriticRole) -> None:
        critic.begin(self._rollout, self.mini_batches)
        self.values = critic.values()


def _names(sample: Sample) -> tuple[int, int]:
    return sample.group_id, sample.sample_id


def passes_of(rollout: Rollout, roles: Roles, config: PPOConfig, *, step: int) -> ForwardPasses:
    """Forward passes, made."""
    passes = ForwardPasses(rollout, roles.actor, roles.critic, config, step=step)
    with side_by_side(passes.calls(), roles) as wait:
        wait()
    return passes


def make_experience(
    passes: ForwardPasses,
    everyone: Sequence[Sample],
    roles: Roles,
    config: PPOConfig,
    *,
    kl_coef: float,
    reward_scale: tuple[float, float] = (0.0, 1.0),
) -> Experience:
    """Compute advantages, and give actor and critic what their losses need.

    Args:
        passes: of these samples, made.
        everyone: samples with rewards; those that the losses do not look at count in the baselines alone.
        kl_coef: present coefficient of the KL penalty.
        reward_scale: (shift, scale): rewards enter as (reward - shift) / scale.
    """
    algorithm, mini_batches, kl, values = config.algorithm, passes.mini_batches, passes.kl, passes.values
    trained = [in_loss(sample, config) for sample in everyone]
    samples = [sample for sample, is_trained in zip(everyone, trained, strict=True) if is_trained]
    shift, scale = reward_scale
    lengths = torch.tensor([sample.response_length for sample in samples])
    result = compute_advantages(
        algorithm.advantage_estimator,
        rewards=torch.tensor([(sample.reward - shift) / scale for sample in everyone if sample.reward is not None]),
        group_ids=torch.tensor([sample.group_id for sample in everyone]),
        kl=None if algorithm.use_kl_loss or kl is None else torch.from_numpy(kl),
        lengths=lengths,
        values=None if values is None else torch.from_numpy(values),
        kl_coef=0.0 if algorithm.use_kl_loss else kl_coef,
        gamma=algorithm.gamma,
        lambd=algorithm.lambd,
        clip_range=algorithm.reward_clip_range,
        normalize=algorithm.normalize_advantages,
        trained=torch.tensor(trained),
    )
    weights, actor_denominators = loss_weights(lengths, mini_batches, config, critic=False)
    roles.actor.keep({"advantages": result.advantages.numpy()}, scalars={"weights": weights.numpy()})
    weights, critic_denominators = loss_weights(lengths, mini_batches, config, critic=True)
    if roles.critic is not None:
        roles.critic.keep({"returns": result.returns.numpy()}, scalars={"weights": weights.numpy()})
    return Experience(
        actor_denominators=actor_denominators,
        critic_denominators=critic_denominators,
        difference=passes.difference,
        has_reference=algorithm.init_kl_coef > 0,
        values=values,
        kl=kl,
        advantages=result.advantages,
        returns=result.returns,
    )


def split_mini_batches(samples: Sequence[Sample], config: PPOConfig, *, step: int) -> list[list[int]]:
    """Sample indices of each optimizer step of an epoch: a shuffle, cut into mini-batches of one size.

    A mini-batch has about global_batch_size samples: where samples are left without a reward there are fewer
    mini-batches, in proportion. The samples of one prompt stay together where a mini-batch holds whole groups.
    """
    batch = config.batch
    count = max(1, round(len(samples) / batch.global_batch_size))
    whole_groups = batch.global_batch_size % batch.n_samples_per_prompt == 0
    units: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        units.setdefault(sample.group_id if whole_groups else index, []).append(index)
    order = list(units.values())
    if count > 1:
        Random(f"{config.model.seed}-{step}").shuffle(order)
    cuts = [len(order) * number // count for number in range(count + 1)]
    mini_batches = [[i for unit in order[a:b] for i in unit] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    return [mini_batch for mini_batch in mini_batches if mini_batch]


def update_order(num_mini_batches: int, config: PPOConfig, *, step: int) -> list[int]:
    """Mini-batches in the order of the step's optimizer steps: each once an epoch, from the second epoch on shuffled.

    The samples of a mini-batch stay together from epoch to epoch, so that its micro-batches do.
    """
    random, order = Random(f"{config.model.seed}-{step}-order"), list(range(num_mini_batches))
    for _ in range(config.batch.max_epochs - 1):
        order += random.sample(range(num_mini_batches), num_mini_batches)
    return order


def loss_weights(
    lengths: Tensor, mini_batches: Sequence[Sequence[int]], config: PPOConfig, *, critic: bool
) -> tuple[Tensor, list[float]]:
    """Weight of each sample's tokens in the actor's or the critic's loss, and the denominator of each mini-batch.

    Dr. GRPO's denominator is the longest response that may be generated.

    Args:
        lengths: [n] int64 response tokens.
        mini_batches: indices of the samples of each optimizer step.
    """
    algorithm = config.algorithm
    aggregation: Aggregation = algorithm.critic_loss_aggregation if critic else algorithm.loss_aggregation
    if algorithm.advantage_estimator == "dr_grpo":
        aggregation = "constant"
    limit = config.rollout.generate_max_len if aggregation == "constant" else None
    weights_of = partial(token_weights, aggregation=aggregation, max_length=limit)
    return weights_of(lengths)[0], [weights_of(lengths[chosen])[1] for chosen in mini_batches]
