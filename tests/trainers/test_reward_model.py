"""The reward model's objective against a loop over pairs in plain Python, and its statistics."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megarlhf.data.packing import fill_fields, pack_rows
from megarlhf.data.supervised import SupervisedData
from megarlhf.data.types import TrainingRows, training_rows
from megarlhf.engine.objective import TokenOutputs
from megarlhf.trainers.reward_model import reward_objective, reward_task

MARGINS = [0.0, 1.2, -0.3]


def pairs(*, margin: bool) -> TrainingRows:
    """Three pairs of ragged rows, whose last target alone is looked at."""
    sizes = [(2, 3), (2, 1), (1, 4), (1, 2), (3, 2), (3, 5)]
    ids = [list(range(1, prompt + answer + 1)) for prompt, answer in sizes]
    found = training_rows(ids, [prompt for prompt, _ in sizes], unit_ids=[0, 0, 1, 1, 2, 2])
    mask = np.zeros(int(found.num_targets.sum()), dtype=np.bool_)
    mask[np.cumsum(found.num_targets) - 1] = True
    found = replace(found, loss_mask=mask)
    return found.with_fields({}, scalars={"margin": np.repeat(np.float32(MARGINS), 2)} if margin else {})


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("margin", [False, True])
def test_objective_is_its_loop_over_pairs(margin: bool, share_prefix: bool) -> None:
    rows = pairs(margin=margin)
    batch = fill_fields(pack_rows(rows, [4, 5, 0, 1, 2, 3], share_prefix=share_prefix, min_length=30), rows)
    values = torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss, metrics = reward_objective().loss(TokenOutputs(values=values), batch)
    rewards = {}  # of the position before each row's last token
    for position, (row, looked_at) in enumerate(zip(batch.row_ids.tolist(), batch.target_mask.tolist(), strict=True)):
        if looked_at:
            assert row not in rewards
            assert batch.targets[position] == rows.lengths[row], "token n of a row is n, and this is the last one"
            rewards[row] = values[position].item()
    wanted, sums = 0.0, dict.fromkeys(metrics, 0.0)
    for pair, pair_margin in enumerate(MARGINS if margin else [0.0] * 3):
        chosen, rejected = rewards[2 * pair], rewards[2 * pair + 1]
        wanted += math.log(1 + math.exp(rejected - chosen + pair_margin))
        for name, value in {
            "accuracy": float(chosen > rejected),
            "margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "reward_mean": chosen + rejected,
            "reward_square": chosen**2 + rejected**2,
        }.items():
            sums[name] += value
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    for name, (value, count) in metrics.items():
        assert count == (6 if name in ("reward_mean", "reward_square") else 3)
        assert value.item() == pytest.approx(sums[name], rel=1e-6, abs=1e-7), name
    loss.backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.nonzero()[:, 0].tolist() == batch.target_mask.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("share_prefix", [False, True])
def test_a_pair_that_is_there_twice_counts_twice(share_prefix: bool) -> None:
    rows, losses = pairs(margin=True), []
    for indices in ([0, 1, 4, 5], [0, 1], [0, 1, 4, 5, 0, 1]):
        drawn = rows.drawn(indices)
        batch = fill_fields(pack_rows(drawn, range(len(drawn)), share_prefix=share_prefix), drawn)
        assert batch.target_mask.sum() == len(indices)
        values = torch.where(batch.target_mask, batch.targets * 0.3, 99.0)  # of a row, the same wherever it lies
        losses.append(reward_objective().loss(TokenOutputs(values=values), batch)[0].item())
    assert losses[2] == pytest.approx(losses[0] + losses[1], rel=1e-6)
    data = SupervisedData(rows=rows)
    assert [reward_task().denominator(data, np.array(r)) for r in ([0, 1, 4, 5], [0, 1, 4, 5, 0, 1])] == [2.0, 3.0]


def test_statistics_are_those_of_all_rewards() -> None:
    rewards = np.array([0.3, -1.2, 4.0, 2.0])
    task = reward_task()
    found = task.metrics({"accuracy": 0.5, "reward_mean": rewards.mean(), "reward_square": np.square(rewards).mean()})
    assert found == pytest.approx({"accuracy": 0.5, "reward_mean": rewards.mean(), "reward_std": rewards.std()})
    assert task.config_entries is not None
    assert task.config_entries(found) == pytest.approx({"mean": rewards.mean(), "std": rewards.std()})
    equal = task.config_entries({"reward_mean": 1.0, "reward_std": 0.0})
    assert equal["std"] > 0, "rewards are divided by it"
