"""A reward model trained in parts is exported as a classifier that gives each row the reward that we give it."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from megarlhf.data.types import TrainingRows, training_rows
from megarlhf.engine.export import export_hf
from megarlhf.trainers.reward_model import reward_objective
from tests.distributed.cases import by_row, sequences
from tests.distributed.layouts import LAYOUTS, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model


def pairs() -> TrainingRows:
    """Six pairs of ragged answers to prompts of their own; a filler stands behind each, and the loss looks at it."""
    draw = random.Random(3)
    prompts = [[draw.randrange(3, 100) for _ in range(2 + number)] for number in range(6)]
    ids = [[*p, *(draw.randrange(3, 100) for _ in range(draw.randrange(1, 6))), 1] for p in prompts for _ in range(2)]
    lengths = [len(p) for p in prompts for _ in range(2)]
    rows = training_rows(ids, lengths, unit_ids=np.repeat(np.arange(6), 2).tolist())
    mask = np.zeros(int(rows.num_targets.sum()), dtype=np.bool_)
    mask[np.cumsum(rows.num_targets) - 1] = True
    return replace(rows, loss_mask=mask)


def rewards_case(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, directory: Path
) -> dict[int, float]:
    """Train two steps and export; the reward of each row that this rank has."""
    with world(layout, rank, init_method):
        engine, rows = build(layout, model_dir, head="value"), pairs()
        for _ in range(2):
            engine.step(engine.micro_batches(rows), reward_objective(), denominator=6.0)
        found = by_row(rows, engine.forward(engine.micro_batches(rows)))
        export_hf(engine, directory)
        return {row: float(values[-1]) for row, values in found.items()}


@pytest.mark.parametrize("name", ["TP2-SP", "PP2-VPP2", "share-prefix-TP2-SP", "share-prefix-PP2"])
def test_each_row_has_its_reward(ranks: RankPool, tmp_path: Path, name: str) -> None:
    layout, model_dir = LAYOUTS[name], make_model(tmp_path / "model", family="llama")
    results = ranks.run(layout.world_size, rewards_case, layout, model_dir, tmp_path / "hf")
    ours = {row: value for result in results for row, value in result.items()}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    model.config.pad_token_id = 0  # in no row
    with torch.no_grad():
        theirs = [model(torch.tensor([tokens[:-1]])).logits.item() for tokens, _ in sequences(pairs())]
    assert [ours[row] for row in range(len(theirs))] == pytest.approx(theirs, abs=1e-5)
    assert np.std(theirs) > 0.01, "they are told apart"
