"""Checkpoints of the engine in several states and layouts, and what it does with numbers that are none."""

from pathlib import Path

import pytest
import torch

from megarlhf.engine.checkpoint import load_engine, save_engine
from megarlhf.engine.engine import NonFiniteError
from tests.distributed.cases import assemble, make_objective, make_rows, parts
from tests.distributed.layouts import LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

Weights = list[tuple[str, tuple[slice, ...], torch.Tensor]]


def save_after(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, target: Path, steps: int
) -> tuple[Weights, float]:
    """Train, save, and take one more step: its weights and learning rate."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        for _ in range(steps):
            engine.train_step(make_rows(), make_objective("sft"), denominator=50.0)
        save_engine(engine, target)
        step = engine.train_step(make_rows(seed=6), make_objective("sft"), denominator=50.0)
        return parts(engine, gradients=False), step.learning_rate


def load_and_step(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, source: Path
) -> tuple[Weights, float]:
    """Load and take the step that save_after took."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        load_engine(engine, source)
        step = engine.train_step(make_rows(seed=6), make_objective("sft"), denominator=50.0)
        return parts(engine, gradients=False), step.learning_rate


@pytest.mark.parametrize("steps", [0, 2], ids=["before-the-first-step", "after-two"])
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("single", "single"), ("DP2-distopt", "DP2-distopt"), ("DP2-distopt", "PP2-distopt"), ("single", "TP2")],
)
def test_a_loaded_engine_takes_the_same_step(
    ranks: RankPool, tmp_path: Path, saved: str, loaded: str, steps: int
) -> None:
    layouts = LAYOUTS | {"single": SINGLE, "PP2-distopt": Layout(pipeline=2, distributed_optimizer=True)}
    model_dir = make_model(tmp_path / "model", tied=True, family="llama")
    _check_resumed(ranks, model_dir, layouts[saved], layouts[loaded], steps)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "deepseek-v3"])
def test_a_checkpoint_holds_every_kind_of_layer(ranks: RankPool, tmp_path: Path, family: str) -> None:
    model_dir = make_model(tmp_path / "model", family=family)
    _check_resumed(ranks, model_dir, SINGLE, LAYOUTS["TP2-SP"], 1)


def _check_resumed(ranks: RankPool, model_dir: Path, saved: Layout, loaded: Layout, steps: int) -> None:
    target = model_dir / "checkpoint"
    before = ranks.run(saved.world_size, save_after, saved, model_dir, target, steps)
    after = ranks.run(loaded.world_size, load_and_step, loaded, model_dir, target)
    assert after[0][1] == before[0][1], "the schedule goes on"
    expected, found = assemble([weights for weights, _ in before]), assemble([weights for weights, _ in after])
    tolerance = 0.0 if saved == loaded else 1e-5
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=0, msg=name)


def poisoned_step(rank: int, world_size: int, init_method: str, model_dir: Path) -> tuple[str, bool]:
    """An advantage that is NaN: the message, and whether every weight is as it was."""
    with world(SINGLE, rank, init_method):
        engine, rows = build(SINGLE, model_dir), make_rows()
        rows[4].fields["advantages"][0] = torch.nan
        before = [p.detach().clone() for _, p in engine.named_parameters()]
        with pytest.raises(NonFiniteError) as raised:
            engine.train_step(rows, make_objective("actor"), denominator=9.0)
        return str(raised.value), all(
            torch.equal(a, b) for a, b in zip(before, (p for _, p in engine.named_parameters()), strict=True)
        )


def test_a_loss_that_is_no_number_stops_before_the_weights_change(ranks: RankPool, tmp_path: Path) -> None:
    message, unchanged = ranks.run(1, poisoned_step, make_model(tmp_path / "model", tied=True, family="llama"))[0]
    assert "loss=nan" in message and unchanged
