"""Reward model: of two answers to one prompt the chosen one has the larger value, read at its EOS."""

import math

from torch import Tensor

from megarlhf.algos.reward_models import pairwise_loss
from megarlhf.data.types import MicroBatch
from megarlhf.engine.objective import Metrics, Objective, TokenOutputs
from megarlhf.engine.sequences import sequence_sums
from megarlhf.trainers.supervised import SupervisedTask

_MOMENTS = ("reward_mean", "reward_square")


def reward_task() -> SupervisedTask:
    """Its objective, over pairs of rows; the export's config.json has the rewards' `mean` and `std`, as OpenRLHF's."""

    def with_std(means: dict[str, float]) -> dict[str, float]:
        mean, square = (means[name] for name in _MOMENTS)
        own = {name: value for name, value in means.items() if name not in _MOMENTS}
        return own | {"reward_mean": mean, "reward_std": math.sqrt(max(0.0, square - mean**2))}

    def for_normalization(found: dict[str, float]) -> dict[str, float]:
        return {"mean": found["reward_mean"], "std": max(found["reward_std"], 1e-8)}  # what rewards are divided by

    return SupervisedTask(
        name="rm", objective=reward_objective(), mean_over="units", metrics=with_std, config_entries=for_normalization
    )


def reward_objective() -> Objective:
    """-log sigmoid(reward of chosen - reward of rejected - margin) of each pair, summed.

    The row with the even number is chosen, the next one rejected; the loss looks at one target of each, that behind its
    EOS, and the value there is the reward. Field of the micro-batch: `margin`, which may be absent.
    """

    def loss(outputs: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        assert outputs.values is not None
        rows, rewards = sequence_sums(outputs.values, batch)
        order = rows.argsort()
        first, second = order[0::2], order[1::2]
        assert (rows[first] % 2 == 0).all() and (rows[first] + 1 == rows[second]).all(), "chosen first, in pairs"
        margin = sequence_sums(batch.fields["margin"], batch)[1][first] if "margin" in batch.fields else None
        total = pairwise_loss(rewards[first], rewards[second], margin).sum()
        rewards = rewards.detach()
        chosen, rejected, pairs = rewards[first], rewards[second], len(first)
        return total, {
            "accuracy": ((chosen > rejected).sum(), pairs),
            "margin": ((chosen - rejected).sum(), pairs),
            "chosen_reward": (chosen.sum(), pairs),
            "rejected_reward": (rejected.sum(), pairs),
            "reward_mean": (rewards.sum(), 2 * pairs),
            "reward_square": (rewards.double().square().sum(), 2 * pairs),
        }

    names = ("accuracy", "margin", "chosen_reward", "rejected_reward", *_MOMENTS)
    return Objective(loss=loss, metric_names=names)
