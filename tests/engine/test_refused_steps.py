"""Steps whose loss or gradient is not finite: refused on every rank, before anything changes."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarlhf.data.types import MicroBatch
from megarlhf.engine.checkpoint import load_engine, save_engine
from megarlhf.engine.engine import MegatronEngine, NonFiniteError
from megarlhf.engine.objective import Metrics, Objective, TokenOutputs
from megarlhf.engine.optimizer import OptimizerOptions
from megarlhf.trainers.sft import sft_objective
from tests.distributed.cases import make_rows
from tests.distributed.layouts import Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

DENOMINATOR = 40.0
OPTIONS = OptimizerOptions(learning_rate=4e-3, total_steps=6, adam_eps=2e-3, weight_decay=0.6)


def without_loss(rank: int) -> Objective:
    """The supervised loss, NaN on one rank, with a gradient that is finite."""

    def loss(outputs: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        total, metrics = sft_objective().loss(outputs, batch)
        return (total + math.nan if dist.get_rank() == rank else total), metrics  # its gradient is that of total

    return Objective(loss=loss, metric_names=())


def poisoned(value: float, rank: int | None) -> Objective:
    """The supervised loss with finite numbers and a gradient of `value` on one rank, or on all."""

    def loss(outputs: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        assert outputs.log_probs is not None
        if rank is None or dist.get_rank() == rank:
            outputs.log_probs.register_hook(lambda gradient: torch.full_like(gradient, value))
        return sft_objective().loss(outputs, batch)

    return Objective(loss=loss, metric_names=())


def everything(engine: MegatronEngine) -> dict[str, Tensor]:
    """Weights, main weights, running means and step counts, schedule, on this rank."""
    engine.finish_param_gather()
    state = {name: p.detach().clone() for name, p in engine.named_parameters()}
    state["schedule"] = torch.tensor(engine.scheduler.num_steps)
    for part, inner in enumerate(engine.optimizer.chained_optimizers):
        for number, group in enumerate(inner.optimizer.param_groups):
            state[f"{part}.{number}.rate"] = torch.tensor((group["lr"], group["weight_decay"]), dtype=torch.float64)
            for place, main in enumerate(group["params"]):
                state[f"{part}.{number}.{place}"] = main.detach().clone()
                for name, value in inner.optimizer.state.get(main, {}).items():
                    state[f"{part}.{number}.{place}.{name}"] = torch.as_tensor(value).clone()
    return state


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    same = {name for name in one.keys() & other.keys() if torch.equal(one[name], other[name])}
    return sorted((one.keys() | other.keys()) - same)


def spoil_after_reduction(engine: MegatronEngine) -> Callable[[], None]:
    """The last rank's own copy of the reduced gradient gets an infinite number; returns what ends that."""
    kept = engine.config.finalize_model_grads_func

    def spoil(*arguments: Any, **options: Any) -> None:
        kept(*arguments, **options)
        if dist.get_rank() == dist.get_world_size() - 1:
            for _, parameter in engine.named_parameters():
                parameter.main_grad.view(-1)[:] = math.inf

    engine.config.finalize_model_grads_func = spoil
    return lambda: setattr(engine.config, "finalize_model_grads_func", kept)


def refused_steps(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, clip_grad: float, target: Path
) -> list[str]:
    """Whatever a refused step leaves behind, in this engine or in the steps after, by name."""
    with world(layout, rank, init_method):
        options = replace(OPTIONS, clip_grad=clip_grad)
        engine, other = build(layout, model_dir, options=options), build(layout, model_dir, options=options)

        def step(which: MegatronEngine, seed: int, objective: Objective) -> float:
            return which.train_step(make_rows(seed=seed), objective, denominator=DENOMINATOR).grad_norm

        left: list[str] = []
        for seed in range(2):
            before = everything(engine)
            for value, poisoned_rank in ((math.nan, world_size - 1), (math.inf, None)):
                with pytest.raises(NonFiniteError):
                    step(engine, 7, poisoned(value, poisoned_rank))
                left += [f"refused {seed}: {name}" for name in differing(before, everything(engine))]
            if left:
                return left  # nothing that follows means anything
            with pytest.raises(NonFiniteError, match="loss=nan"):
                step(engine, 7, without_loss(world_size - 1))
            left += [f"no loss {seed}: {name}" for name in differing(before, everything(engine))]
            restore = spoil_after_reduction(engine)
            with pytest.raises(NonFiniteError):
                step(engine, 8, sft_objective())
            restore()
            left += [f"spoilt {seed}: {name}" for name in differing(before, everything(engine))]
            norm = step(engine, seed, sft_objective())
            assert norm > 0.15 and norm == step(other, seed, sft_objective())
        left += [f"later: {name}" for name in differing(everything(engine), everything(other))]
        with pytest.raises(NonFiniteError):
            step(engine, 7, poisoned(math.nan, None))
        save_engine(engine, target)
        loaded = build(layout, model_dir, options=options)
        load_engine(loaded, target)
        left += [f"saved: {name}" for name in differing(everything(engine), everything(loaded))]
        return left


REFUSED = {
    "fp32": ("qwen2", Layout(), 0.15),
    "bf16, no clip": ("qwen2", Layout(bf16=True), 0.0),
    "DP2, no clip": ("qwen2", Layout(data=2), 0.0),
    "PP2, no clip": ("qwen2", Layout(pipeline=2), 0.0),
    "bf16 DP2-distopt-overlap": ("qwen2", Layout(bf16=True, data=2, distributed_optimizer=True, overlap=True), 0.15),
    "EP2, no clip": ("mixtral", Layout(data=2, expert=2), 0.0),
    "EP2-distopt": ("mixtral", Layout(data=2, expert=2, distributed_optimizer=True), 0.15),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_gradient_that_is_not_finite_changes_nothing(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """Infinite or NaN, on one rank or all, before the first step and after it; saving goes on to work."""
    family, layout, clip_grad = REFUSED[name]
    model_dir = make_model(tmp_path / "model", family=family, num_hidden_layers=2)
    for left in ranks.run(layout.world_size, refused_steps, layout, model_dir, clip_grad, tmp_path / "saved"):
        assert left == []


def overflowing_metric(rank: int, world_size: int, init_method: str, model_dir: Path) -> tuple[float, list[bool]]:
    """A step whose metrics are infinite and NaN: the metric, and which weights moved."""

    def loss(outputs: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        total, _ = sft_objective().loss(outputs, batch)
        infinite, undefined = total.detach() * math.inf, total.detach() * math.nan
        return total, {"ratio_mean": (infinite, 3), "kl": (undefined, 3), "entropy": (total.detach(), 3)}

    with world(Layout(), rank, init_method):
        engine = build(Layout(), model_dir, options=OPTIONS)
        before = {name: p.detach().clone() for name, p in engine.named_parameters()}
        objective, rows = Objective(loss=loss, metric_names=("ratio_mean", "kl", "entropy")), make_rows()
        result = engine.train_step(rows, objective, denominator=DENOMINATOR)
        assert math.isfinite(result.loss) and math.isnan(result.metrics["kl"])
        count = 3 * len(engine.micro_batches(rows))  # a metric is divided by its own count, unlike the loss
        assert count != DENOMINATOR and result.metrics["entropy"] == pytest.approx(result.loss * DENOMINATOR / count)
        return result.metrics["ratio_mean"], [not torch.equal(p, before[name]) for name, p in engine.named_parameters()]


def test_a_metric_that_overflows_stops_no_step(ranks: RankPool, tmp_path: Path) -> None:
    ratio, moved = ranks.run(1, overflowing_metric, make_model(tmp_path / "model", num_hidden_layers=1))[0]
    assert ratio == math.inf and all(moved)
