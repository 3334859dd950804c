"""The RL loop: PPO, REINFORCE(++), RLOO and GRPO alike, one line a phase."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from megarlhf.config.arguments import PPOConfig
from megarlhf.data.prompts import PromptData, PromptSampler
from megarlhf.data.types import Prompt, Sample
from megarlhf.metrics.sinks import Sinks
from megarlhf.metrics.timers import Timers
from megarlhf.trainers import summary
from megarlhf.trainers.experience import Experience, make_experience, mini_batches, training_rows, with_result
from megarlhf.trainers.roles import Roles, UpdateResult
from megarlhf.trainers.state import LoopState

CORRECT_REWARD = 1.0  # a greedy response counts as correct from this reward on


@dataclass(frozen=True, kw_only=True)
class Updates:
    """Results of a step's optimizer steps, and which samples each took."""

    actor: list[UpdateResult]
    critic: list[UpdateResult]
    indices: list[list[int]]


def train(
    config: PPOConfig,
    roles: Roles,
    prompts: PromptData,
    eval_prompts: list[Prompt] | None,
    state: LoopState,
    sinks: Sinks,
    timers: Timers,
    should_stop: Callable[[], bool],
) -> None:
    """Run from `state` to train_iters; evaluate before the first step, every eval_interval and at the end.

    When should_stop() turns true the step in progress is finished, saved, and the loop returns.
    """
    batch, logging = config.batch, config.logging
    sampler = PromptSampler(len(prompts.prompts), batch.rollout_batch_size, config.model.seed)
    if state.step == 0:
        with roles.phases.sync():
            roles.sync.push(0)
        metrics = evaluate(roles, eval_prompts, timers)
        sinks.log(0, metrics | {"data/prompts_dropped": float(prompts.num_dropped)} | timers.pop())
    while state.step < batch.train_iters:
        step, started = state.step + 1, time.perf_counter()
        chosen = [prompts.prompts[i] for i in sampler.batch(step - 1)]
        sinks.phase("rollout")
        with roles.phases.rollout():
            generated = roles.rollout.generate(chosen, step=step)
        sinks.phase("reward")
        with timers("reward"):
            scored = roles.reward.score(generated)
        samples = with_result(scored, estimator=config.algorithm.advantage_estimator)
        if config.algorithm.normalize_reward:
            state.reward_moments.add([sample.reward for sample in samples if sample.reward is not None])
        sinks.phase("train")
        with roles.phases.train():
            with timers("experience"):
                experience = make_experience(
                    samples,
                    roles.actor,
                    roles.critic,
                    config,
                    kl_coef=state.kl_controller.coef,
                    reward_scale=state.reward_moments.scale() if config.algorithm.normalize_reward else (0.0, 1.0),
                )
            updates = update(roles, experience, config, step=step)
        sinks.phase("sync")
        with roles.phases.sync():
            synced = roles.sync.push(step)
        metrics = summary.step_metrics(scored, experience, updates.actor, updates.critic, updates.indices)
        metrics["kl/coef"] = state.kl_controller.coef
        state.kl_controller.update(metrics.get("kl/mean", 0.0), len(samples))
        state.step = step
        summary.check_log_prob_difference(metrics, config.rollout.logprob_diff_budget)
        last = step == batch.train_iters or should_stop()
        if last or (logging.eval_interval and step % logging.eval_interval == 0):
            metrics |= evaluate(roles, eval_prompts, timers)
        metrics |= synced | {"data/epoch": sampler.epoch(step), "data/prompts_dropped": float(prompts.num_dropped)}
        metrics |= summary.speed(generated, seconds=time.perf_counter() - started) | timers.pop()
        sinks.log(step, metrics)
        # Logged first: a run killed in between continues from the checkpoint before, and logs this step again.
        if last or (logging.save_interval and step % logging.save_interval == 0):
            sinks.phase("save")
            with timers("save"):
                roles.checkpoint.save(step, state.to_json())
        if last:
            return


def update(roles: Roles, experience: Experience, config: PPOConfig, *, step: int) -> Updates:
    """Critic and actor optimizer steps over the mini-batches; the actor rests for the first freezing_actor_steps."""
    actor, critic, chosen = [], [], []
    longest = config.rollout.generate_max_len
    for indices in mini_batches(experience, config, step=step):
        chosen.append(indices)
        if roles.critic is not None:
            rows, total = training_rows(experience, indices, config.algorithm, max_length=longest, critic=True)
            critic.append(roles.critic.update(rows, denominator=total))
        if step > config.optimizer.freezing_actor_steps:
            rows, total = training_rows(experience, indices, config.algorithm, max_length=longest, critic=False)
            actor.append(roles.actor.update(rows, denominator=total))
    return Updates(actor=actor, critic=critic, indices=chosen)


def evaluate(roles: Roles, prompts: list[Prompt] | None, timers: Timers) -> dict[str, float]:
    """Greedy accuracy on held-out prompts: the fraction whose response earns CORRECT_REWARD or more.

    Responses without a result are left out and counted; nothing is reported without prompts.
    """
    if not prompts:
        return {}
    with roles.phases.rollout(), timers("eval"):
        scored: list[Sample] = roles.reward.score(roles.rollout.generate_greedy(prompts))
    rewards = [sample.reward for sample in scored if sample.reward is not None]
    metrics = {
        "eval/response_length_mean": sum(len(s.response_ids) for s in scored) / len(scored),
        "eval/no_result_count": float(len(scored) - len(rewards)),
    }
    if rewards:
        metrics["eval/accuracy"] = sum(reward >= CORRECT_REWARD for reward in rewards) / len(rewards)
    return metrics
