"""The process reward model's objective, from hidden states on, against a loop over placeholders in plain Python."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarlhf.data.packing import fill_fields, pack_rows
from megarlhf.data.types import MicroBatch, TrainingRows, training_rows
from megarlhf.engine.objective import OutputLayer
from megarlhf.parallel.vocab import OutputDistribution
from megarlhf.trainers.process_reward_model import process_reward_objective

VOCAB, HIDDEN, PLACEHOLDER, REWARDS = 11, 4, 3, (9, 5, 2)
SHARES = [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.2, 0.8, 0.0), (0.5, 0.5, 0.0)]
LABELS = [9, 5, 5, 10]
OF_ROWS = {0: [0, 1], 1: [2], 2: [3]}  # the labels of each row


def rows(*, hard: bool) -> TrainingRows:
    """Three rows with four placeholders; one that is a row's last token is no input."""
    ids = [[1, 4, 3, 7, 3, 3], [6, 3, 8], [1, 2, 3, 3]]
    found = training_rows(ids, [1, 1, 1])
    mask = np.concatenate([np.array(row[:-1]) == PLACEHOLDER for row in ids])
    values = np.array(LABELS if hard else SHARES, dtype=np.float32)
    field = np.zeros((len(mask), *values.shape[1:]), dtype=np.float32)
    field[mask] = values
    return replace(found.with_fields({"label_ids" if hard else "shares": field}), loss_mask=mask)


def packed(*, hard: bool) -> tuple[MicroBatch, Tensor, Tensor]:
    """The rows in one packed sequence, with hidden states of every position and an output layer's weights."""
    generator = torch.Generator().manual_seed(2)
    found = rows(hard=hard)
    batch = fill_fields(pack_rows(found, [2, 0, 1], share_prefix=False, min_length=12), found)
    hidden = torch.randn(len(batch.tokens), HIDDEN, generator=generator, dtype=torch.float64)
    return batch, hidden, torch.randn(16, HIDDEN, generator=generator, dtype=torch.float64)


def found_loss(batch: MicroBatch, hidden: Tensor, weight: Tensor, *, hard: bool) -> tuple[Tensor, tuple[Tensor, int]]:
    (places,) = batch.target_mask.nonzero(as_tuple=True)
    layer = OutputLayer(
        hidden=hidden[places],
        weight=weight,
        places=places,
        distribution=OutputDistribution(vocab_size=VOCAB, chunk_tokens=2),
        group=ONE,  # type: ignore[arg-type]
    )
    objective = process_reward_objective(None if hard else REWARDS)
    assert objective.outputs is not None
    loss, metrics = objective.loss(objective.outputs(layer, batch), batch)
    value, count = metrics["accuracy"]
    assert isinstance(count, int)
    return loss, (value, count)


class One:
    """A tensor-parallel group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


ONE: dist.ProcessGroup | One = One()


@pytest.mark.parametrize("hard", [False, True])
def test_objective_is_its_scalar_loop(hard: bool) -> None:
    batch, hidden, weight = packed(hard=hard)
    hidden.requires_grad_()
    loss, (correct, count) = found_loss(batch, hidden, weight, hard=hard)
    total, right, number = 0.0, 0, 0
    left = {row: list(labels) for row, labels in OF_ROWS.items()}
    for position, token in enumerate(batch.tokens.tolist()):
        row = int(batch.row_ids[position])
        if row < 0 or token != PLACEHOLDER:
            continue
        label = left[row].pop(0)
        logits = [math.fsum(a * b for a, b in zip(hidden[position].tolist(), w, strict=True)) for w in weight.tolist()]
        tokens = range(VOCAB) if hard else REWARDS
        normalizer = math.log(math.fsum(math.exp(logits[t]) for t in tokens))
        judged = max(tokens, key=lambda t: logits[t])
        if hard:
            total += normalizer - logits[LABELS[label]]
            right += judged == LABELS[label]
        else:
            shares = dict(zip(REWARDS, SHARES[label], strict=True))
            total += math.fsum(share * (normalizer - logits[t]) for t, share in shares.items())
            right += judged == max(REWARDS, key=lambda t: shares[t])
        number += 1
    assert not any(left.values())
    assert loss.item() == pytest.approx(total, rel=1e-6)
    assert (correct.item(), count) == (right, number)
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and not hidden.grad[~batch.target_mask].any()
