"""What a forward pass computes can be a field of the loss: of the same tokens, in every layout."""

from pathlib import Path

import pytest
from torch import Tensor

from megarlhf.data.packing import add_values
from megarlhf.data.types import MicroBatch
from megarlhf.engine.objective import Metrics, Objective, TokenOutputs
from megarlhf.trainers.parity_cases import (
    fitting,
)
from tests.distributed.cases import make_rows
from tests.distributed.layouts import LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model


def loss(outputs: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, Metrics]:
    assert outputs.log_probs is not None
    own, before = outputs.log_probs[batch.target_mask], batch.fields["before"][batch.target_mask]
    apart = (own.detach() - before).abs()
    return (own * before).sum(), {"before": (before.sum(), len(before)), "apart": (apart.sum(), 1)}


def case(rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path) -> tuple[float, float, float]:
    """Loss of a step and both metrics."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        objective = Objective(loss=loss, metric_names=("before", "apart"))
        rows = fitting(engine, make_rows())
        for _ in range(2):  # the second with other weights
            batches = engine.micro_batches(rows)
            batches = add_values(batches, "before", engine.forward(batches))
            result = engine.step(batches, objective, denominator=30.0)
        return result.loss, result.metrics["before"], result.metrics["apart"]


@pytest.mark.parametrize("name", ["PP2-VPP2", "CP2-p2p", "DP2", "share-prefix-TP2-SP"])
def test_fields_of_forward_passes_reach_the_loss(ranks: RankPool, tmp_path: Path, name: str) -> None:
    model_dir = make_model(tmp_path / "model", family="llama")
    expected = ranks.run(1, case, SINGLE, model_dir)[0]
    assert expected[0] > 1.0 and expected[1] < -1.0
    for found in ranks.run(LAYOUTS[name].world_size, case, LAYOUTS[name], model_dir):
        assert found[:2] == pytest.approx(expected[:2], rel=1e-4)
        assert found[2] < 1e-3, "the same tokens under the same weights"
