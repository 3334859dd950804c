"""What roles make of the configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import from_dict
from megarlhf.config.roles import ROLES
from megarlhf.trainers.assembly import build_engine
from tests.distributed.cases import by_row, fitting, make_rows, sequences
from tests.distributed.layouts import SINGLE, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_reward_model


def critic_values(rank: int, world_size: int, init_method: str, config: PPOConfig) -> dict[int, Any]:
    """Of the rows of these tests, by a critic as a run has it."""
    with world(SINGLE, rank, init_method):
        engine = build_engine(config, ROLES["critic"])
        rows = fitting(engine, make_rows())
        return by_row(rows, engine.forward(engine.micro_batches(rows)))


@pytest.mark.parametrize("normalised", [False, True])
def test_a_critic_from_a_reward_model_speaks_of_rewards_as_they_are_normalised(
    ranks: RankPool, tmp_path: Path, normalised: bool
) -> None:
    directory = make_reward_model(tmp_path / "rm", seed=5, entries={"mean": 0.5, "std": 2.5})
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    options = {"pretrain": str(directory), "reward_pretrain": str(directory), "normalize_reward": normalised}
    options |= {"prompt_data": "d", "save": str(tmp_path / "run"), "train_iters": 1}
    config = from_dict(PPOConfig, options)
    found = ranks.run(1, critic_values, config)[0]
    for index, (tokens, prompt_length) in enumerate(sequences(make_rows())):
        hidden = model.model(torch.tensor([tokens[:-1]])).last_hidden_state[0]
        values = (hidden @ model.score.weight.T)[prompt_length - 1 :, 0].detach()
        expected = (values - 0.5) / 2.5 if normalised else values
        torch.testing.assert_close(torch.as_tensor(found[index]), expected, atol=1e-5, rtol=0)
