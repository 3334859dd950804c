"""The RL loop: PPO, REINFORCE(++), RLOO and GRPO alike, one line a phase."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from megarlhf.config.arguments import PPOConfig
from megarlhf.data.prompts import PromptData
from megarlhf.engine.objective import NonFiniteError
from megarlhf.metrics.sinks import Sinks
from megarlhf.trainers import precision, summary
from megarlhf.trainers.evaluation import EvaluationSets, evaluate, evaluation_is_due
from megarlhf.trainers.experience import (
    Updates,
    check_rewards,
    enough_results,
    in_loss,
    make_experience,
    passes_of,
    penalised,
    update_order,
    with_result,
)
from megarlhf.trainers.roles import Roles, TrainingRole, UpdateResult
from megarlhf.trainers.sampling_rounds import Collected, collect
from megarlhf.trainers.saving import saved
from megarlhf.trainers.side_by_side import side_by_side
from megarlhf.trainers.state import LoopState, RewardMoments, saved_on_failure


def train(
    config: PPOConfig,
    roles: Roles,
    prompts: PromptData,
    eval_sets: EvaluationSets,
    state: LoopState,
    sinks: Sinks,
    should_stop: Callable[[], bool],
) -> None:
    """Run from `state` to train_iters; evaluate before the first step, when it is due and at the end.

    When should_stop() turns true the step in progress is finished, saved, and the loop returns. What ends the run
    otherwise leaves a checkpoint of the last finished step, as far as its weights are still known.
    """
    total_steps, logging, phases = config.batch.total_steps, config.logging, roles.phases
    first, num_prompts = state.step, len(prompts.prompts)
    dropped = {"data/prompts_dropped": float(prompts.num_dropped)}
    measure = partial(evaluate, phases, roles.rollout, roles.reward, eval_sets, config)
    with saved_on_failure(roles, state):
        precision.set_rollout(config, roles, state)
        with phases.sync():
            synced = roles.sync.push(state.step)  # the engines start from the pretrained weights
        if state.step == 0:
            sinks.log(0, measure() | dropped | phases.seconds())
        if state.unlogged is not None:
            state.unlogged |= synced
        while state.step < total_steps or state.unlogged is not None:
            if state.unlogged is None:  # else a run before this one has trained the step, and failed after that
                _finish_step(config, roles, prompts, state, is_first=state.step == first)
            step, metrics, best = state.step, state.unlogged or {}, state.best
            last = step == total_steps or should_stop()
            epochs = state.consumed_before / num_prompts, state.consumed_prompts / num_prompts
            if last or evaluation_is_due(step, logging.eval_interval, epochs=epochs):
                metrics |= measure()
                state.best = best.after(step, metrics, logging)
            state.unlogged = None
            sinks.log(step, metrics | {"data/epoch": epochs[1]} | dropped | phases.seconds())
            check_rewards(state, metrics, config)
            # Logged first: a run killed in between continues from the checkpoint before, and logs this step again.
            if last or state.best.step == step or logging.saves(step):
                with phases.save():
                    save = partial(roles.checkpoint.save, step, state.to_json())
                    if not saved(save, step, logging, total_steps=total_steps, is_last=last):
                        state.best = best
            if last:
                return


def _finish_step(config: PPOConfig, roles: Roles, prompts: PromptData, state: LoopState, *, is_first: bool) -> None:
    """Sample, score, train, and move the weights; metrics are in `state.unlogged`, as far as it has come.

    Args:
        is_first: of this process, whose use of memory is that of all its steps.
    """
    started, phases = time.perf_counter(), roles.phases
    collected = collect(config, roles, prompts.prompts, state)  # the phases rollout and reward
    with phases.train():
        metrics = train_step(config, roles, collected, state)
    state.unlogged = metrics
    precision.set_rollout(config, roles, state)
    with phases.sync():
        metrics |= roles.sync.push(state.step)
    if is_first:
        metrics |= phases.memory()
    metrics |= summary.speed(collected.samples, seconds=time.perf_counter() - started) | roles.slowest_ranks()


def train_step(config: PPOConfig, roles: Roles, collected: Collected, state: LoopState) -> dict[str, float]:
    """Experience and optimizer steps on the samples with a result, if they are enough; finishes the step in `state`.

    Returns:
        Metrics of the samples and of their training.
    """
    algorithm, batch, consumed = config.algorithm, config.batch, collected.consumed
    precision.begin_step(config, state)
    samples = with_result(collected.rollout.samples, estimator=algorithm.advantage_estimator)
    everyone = with_result(collected.samples, estimator=algorithm.advantage_estimator)
    metrics = summary.sample_metrics(collected.samples, everyone) | collected.metrics
    is_enough = enough_results(
        len(samples), batch.rollout_batch_size * batch.n_samples_per_prompt, config.reward.min_result_fraction
    )
    if not is_enough or not any(in_loss(sample, config) for sample in samples):
        state.finish_step(consumed_prompts=consumed, trained=False)
        return metrics | {"reward/untrained_steps": float(state.untrained_steps)}
    samples, plain = penalised(samples, config), samples
    metrics |= summary.overlong_metrics(plain, samples, config)
    moments = RewardMoments()
    if config.keeps_reward_moments:
        moments = state.reward_moments.merged([sample.reward for sample in samples if sample.reward is not None])
    step, coef, updates = state.step + 1, state.kl_controller.coef, Updates()
    with roles.phases.experience():
        passes = collected.passes
        if passes is None or not passes.are_of(samples):  # such as without those that have no reward
            passes = passes_of(replace(collected.rollout, samples=samples), roles, config, step=step)
        experience = make_experience(passes, samples, roles, config, kl_coef=coef, reward_scale=moments.scale())
    if experience.difference is not None:
        metrics |= precision.judge_log_probs(experience.difference, config, state, roles.actor, "log_prob")
    state.updating = True
    try:
        trained: list[tuple[TrainingRole, list[float], list[UpdateResult]]] = []
        if roles.critic is not None:
            trained.append((roles.critic, experience.critic_denominators, updates.critic))
        if state.step >= config.optimizer.freezing_actor_steps:
            trained.append((roles.actor, experience.actor_denominators, updates.actor))
        for mini_batch in update_order(len(experience.actor_denominators), config, step=step):
            with side_by_side([partial(_update, mini_batch, *each) for each in trained], roles) as wait:
                wait()
    except NonFiniteError:  # it left the weights as they were before its optimizer step
        state.updating = False
        if updates.actor or updates.critic:
            state.finish_step(consumed_prompts=consumed, trained=True)
        raise
    state.reward_moments = moments
    state.finish_step(consumed_prompts=consumed, trained=True)
    metrics |= summary.training_metrics(experience, updates) | {"kl/coef": coef}
    state.kl_controller.update(metrics.get("kl/mean", 0.0), len(samples))
    if updates.actor and updates.actor[0].difference is not None:
        metrics |= precision.judge_log_probs(updates.actor[0].difference, config, state, roles.actor, "train")
    metrics |= precision.report(config, roles, state)
    return metrics | {"reward/untrained_steps": float(state.untrained_steps)}


def _update(mini_batch: int, role: TrainingRole, denominators: Sequence[float], done: list[UpdateResult]) -> None:
    done.append(role.update(mini_batch, denominator=denominators[mini_batch]))
