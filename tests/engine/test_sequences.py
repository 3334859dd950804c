"""A loss of whole sequences in every layout against Transformers, one row at a time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megarlhf.data.types import MicroBatch, TrainingRows
from megarlhf.engine.objective import Metrics, Objective, TokenOutputs
from megarlhf.engine.sequences import sequence_sums
from megarlhf.trainers.parity import (
    whole_gradients,
)
from megarlhf.trainers.parity_cases import (
    fitting,
)
from tests.distributed.cases import Parts, assemble, make_rows, parts, sequences
from tests.distributed.layouts import LARGE_LAYOUTS, LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

SCALE, DENOMINATOR = 0.21, 7.0


def rows_with_mask() -> TrainingRows:
    """Rows of the groups in turn; every third target is not looked at."""
    rows = make_rows().take([0, 3, 6, 1, 4, 7, 2, 5, 8])
    return replace(rows, loss_mask=np.arange(rows.num_targets.sum()) % 3 != 1)


def sequence_loss(rows: Tensor, sums: Tensor) -> Tensor:
    """Softplus of a row's log-prob, and each row has a weight of its own: a mix-up of rows changes the loss."""
    return (1 + 0.3 * rows) * torch.nn.functional.softplus(-SCALE * sums)


def loss(outputs: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, Metrics]:
    assert outputs.log_probs is not None
    rows, sums = sequence_sums(outputs.log_probs, batch)
    assert len(rows) == len(sums)
    total = sequence_loss(rows, sums).sum()
    _, lengths = sequence_sums(torch.ones_like(outputs.log_probs), batch)  # not 0 where the loss does not look
    means = {"sum": (sums.detach().sum(), len(sums)), "length": (lengths.sum(), len(sums))}
    return total, {"row": (rows.sum(), 1)} | means


def case(rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path) -> tuple[float, Any, Parts]:
    """Loss, metrics and gradients."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        batches = engine.micro_batches(fitting(engine, rows_with_mask()))
        objective = Objective(loss=loss, metric_names=("row", "sum", "length"))
        with whole_gradients(engine):
            found, metrics, _ = engine.accumulate_gradients(batches, objective, denominator=DENOMINATOR)
        return found, metrics, parts(engine, gradients=True)


CASES = {
    "single": SINGLE,
    **{name: LAYOUTS[name] for name in ("CP2-p2p", "CP2-all-gather", "PP2", "DP2", "share-prefix-TP2-SP")},
    "TP2-SP-CP2": LARGE_LAYOUTS["TP2-SP-CP2"],
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], dict[str, Tensor]]:
    """A model, each row's sum, and the gradient of the loss."""
    directory = make_model(tmp_path_factory.mktemp("sequences") / "model", family="llama")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows, sums = rows_with_mask(), list[float]()
    assert rows.loss_mask is not None
    masks = np.split(rows.loss_mask, np.cumsum(rows.num_targets)[:-1])
    for number, ((tokens, prompt_length), mask) in enumerate(zip(sequences(rows), masks, strict=True)):
        ids = torch.tensor([tokens])
        log_probs = model(ids[:, :-1]).logits[0, prompt_length - 1 :].log_softmax(-1)
        own = log_probs.gather(-1, ids[0, prompt_length:, None])[torch.from_numpy(mask), 0].sum()
        (sequence_loss(torch.tensor(number), own) / DENOMINATOR).backward()
        sums.append(float(own.detach()))
    return directory, sums, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_a_sequence_counts_once_wherever_its_tokens_lie(
    ranks: RankPool, expected: tuple[Path, list[float], dict[str, Tensor]], name: str
) -> None:
    directory, sums, gradients = expected
    results = ranks.run(CASES[name].world_size, case, CASES[name], directory)
    wanted = float(sequence_loss(torch.arange(len(sums)), torch.tensor(sums)).sum()) / DENOMINATOR
    for found, metrics, _ in results:
        assert found == pytest.approx(wanted, rel=1e-5)
        assert metrics["sum"] == pytest.approx(sum(sums) / len(sums), rel=1e-5)
        assert metrics["length"] == pytest.approx(rows_with_mask().num_loss_targets.sum() / len(sums))
    found_gradients = assemble([own for _, _, own in results])
    assert found_gradients.keys() == gradients.keys()
    for weight, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[weight], gradient, atol=3e-6, rtol=1e-4, msg=weight)
