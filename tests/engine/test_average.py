"""The average of weights over optimizer steps, against a loop; saved, and loaded in another layout."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megarlhf.engine.average import WeightAverage
from megarlhf.engine.engine import MegatronEngine
from megarlhf.trainers.parity import main_parts
from megarlhf.trainers.parity_cases import parity_case
from tests.distributed.cases import Parts, assemble, make_rows, parts
from tests.distributed.layouts import LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

DECAY, STEPS = 0.75, 3


def main(engine: MegatronEngine) -> Parts:
    """Copies of what the optimizer steps."""
    return [(name, index, part.clone()) for name, index, part in main_parts(engine)]


def train(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, directory: Path
) -> tuple[list[Parts], Parts]:
    """Float32 weights at the start and after each step, and their average."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        average = WeightAverage(engine, DECAY)
        seen, norms = [main(engine)], []
        for _ in range(STEPS):
            norms.append(engine.train_step(make_rows(), parity_case("sft").objective, denominator=50.0).grad_norm)
            average.update()
            seen.append(main(engine))
        own = parts(engine, gradients=False)
        average.save(directory)
        with average.in_place():
            found = parts(engine, gradients=False)
        after = parts(engine, gradients=False)
        assert all(torch.equal(a[2], b[2]) for a, b in zip(after, own, strict=True))
        later = engine.train_step(make_rows(), parity_case("sft").objective, denominator=50.0).grad_norm
        assert later == pytest.approx(norms[-1], rel=0.3), "training goes on after a save"
        return seen, found


def load(rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, directory: Path) -> Parts:
    """The average of a checkpoint."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        average = WeightAverage(engine, DECAY)
        average.load(directory)
        with average.in_place():
            return parts(engine, gradients=False)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["TP2-PP2", "DP2-distopt-overlap"])
def test_average_is_the_loop_and_comes_back_in_another_layout(
    ranks: RankPool, tmp_path: Path, name: str, bf16: bool
) -> None:
    model_dir = make_model(tmp_path / "model", family="llama")
    layout = replace(LAYOUTS[name], bf16=bf16)
    by_rank = ranks.run(layout.world_size, train, layout, model_dir, tmp_path / "average")
    steps = [assemble([seen[step] for seen, _ in by_rank]) for step in range(STEPS + 1)]
    expected = steps[0]
    for weights in steps[1:]:
        expected = {key: DECAY * expected[key] + (1 - DECAY) * weights[key] for key in expected}
    found = assemble([average for _, average in by_rank])
    loaded = assemble(ranks.run(1, load, replace(SINGLE, bf16=bf16), model_dir, tmp_path / "average"))
    moved = max(float((steps[-1][key] - expected[key]).abs().max()) for key in expected)
    assert moved > 1e-4
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)
        torch.testing.assert_close(loaded[key], found[key], rtol=0, atol=0)


def test_a_checkpoint_without_an_average_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", family="llama")
    with pytest.raises(Exception, match="has no average of the weights"):
        ranks.run(1, load, SINGLE, model_dir, tmp_path / "nothing")
