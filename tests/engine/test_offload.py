"""Optimizer state on the host: what is left on the device, sleep, and checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megarlhf.engine.checkpoint import load_engine, save_engine
from megarlhf.engine.optimizer import OptimizerOptions, main_weight
from megarlhf.trainers.sft import sft_objective
from tests.distributed.cases import assemble, make_rows, parts
from tests.distributed.layouts import LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.engine.test_engine import Weights
from tests.tiny_models import make_model

ONE = Layout(distributed_optimizer=True)
ON_DEVICE = OptimizerOptions(learning_rate=4e-3, total_steps=6, adam_eps=2e-3, weight_decay=0.6)
ON_HOST = replace(ON_DEVICE, optimizer_cpu_offload=True)
HALF = replace(ON_HOST, optimizer_offload_fraction=0.5, overlap_cpu_optimizer_d2h_h2d=True)


def bytes_of(rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path) -> list[tuple[int, int]]:
    """Of the optimizer on the device and of what it holds on the host after a step, for each of the options."""
    found = []
    with world(layout, rank, init_method):
        for options in (ON_DEVICE, HALF, ON_HOST):
            engine = build(layout, model_dir, options=options)
            engine.train_step(make_rows(), sft_objective(), denominator=50.0)
            (single,) = engine.optimizer.chained_optimizers
            held = {}
            for inner in getattr(single.optimizer, "cpu_optimizers", []):
                for weight, state in inner.state.items():
                    held |= {tensor.data_ptr(): tensor.nbytes for tensor in (weight, weight.grad)}
                    held |= {state[name].data_ptr(): state[name].nbytes for name in ("exp_avg", "exp_avg_sq")}
            device = getattr(single.optimizer, "gpu_optimizer", single.optimizer)
            counters = 0 if device is None else sum(state["step"].nbytes for state in device.state.values())
            found.append((engine.memory.num_bytes()["optimizer"] - counters, sum(held.values())))
    return found


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_device_is_left_what_the_host_has_not(ranks: RankPool, tmp_path: Path, bf16: bool) -> None:
    """A number stepped on the host takes 16 bytes there: weight, gradient, two moments; in fp32 the device has 8."""
    model_dir = make_model(tmp_path / "model", family="llama")
    (device, none), (half_device, half_host), (left, host) = ranks.run(
        1, bytes_of, replace(ONE, bf16=bf16), model_dir
    )[0]
    each = 12 if bf16 else 8
    assert none == 0 == left and host == 16 * device // each
    assert 0.3 * device < half_device <= 0.5 * device and half_host == host - 16 * half_device // each


def steps(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, sleepy: bool
) -> dict[str, torch.Tensor]:
    """Main weights after three steps, with the optimizer and the parameters asleep between them or not."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir, options=HALF)
        for seed in range(3):
            engine.train_step(make_rows(seed=seed), sft_objective(), denominator=50.0)
            if sleepy:
                engine.sleep("parameters", "optimizer")
                assert not engine.memory.num_bytes()["optimizer"]
                engine.wake("optimizer", "parameters")
        engine.finish_param_gather()
        return {name: main_weight(engine.optimizer, p).clone() for name, p in engine.named_parameters()}


def test_training_is_equal_bit_for_bit_after_sleeps(ranks: RankPool, tmp_path: Path) -> None:
    model_dir, layout = make_model(tmp_path / "model", family="llama"), replace(LAYOUTS["DP2-distopt"], bf16=True)
    awake, slept = (ranks.run(2, steps, layout, model_dir, sleepy) for sleepy in (False, True))
    for expected, found in zip(awake, slept, strict=True):
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def save_after(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, options: OptimizerOptions
) -> Weights:
    """Two steps, a save, and one more: its weights."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir, options=options)
        for _ in range(2):
            engine.train_step(make_rows(), sft_objective(), denominator=50.0)
        save_engine(engine, model_dir / "checkpoint")
        engine.train_step(make_rows(seed=6), sft_objective(), denominator=50.0)
        return parts(engine, gradients=False)


def load_and_step(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, options: OptimizerOptions
) -> tuple[Weights, bool]:
    """The same step after a load, and whether what is held on the host is no view of more."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir, options=options)
        load_engine(engine, model_dir / "checkpoint")
        own = all(
            tensor.untyped_storage().nbytes() == tensor.nbytes
            for single in engine.optimizer.chained_optimizers
            for inner in getattr(single.optimizer, "cpu_optimizers", [])
            for state in inner.state.values()
            for tensor in state.values()
        )
        engine.train_step(make_rows(seed=6), sft_objective(), denominator=50.0)
        return parts(engine, gradients=False), own


DP2, BF16 = LAYOUTS["DP2-distopt"], replace(LAYOUTS["DP2-distopt"], bf16=True)
RESUMED = {  # how it was saved, how it is loaded, and how far weights may be off
    "DP2": (DP2, ON_HOST, DP2, ON_HOST, 0.0),
    "DP2, half, bf16": (BF16, HALF, BF16, HALF, 0.0),
    "to the device": (DP2, HALF, DP2, ON_DEVICE, 1e-5),
    "from the device, TP2": (DP2, ON_DEVICE, Layout(tensor=2, distributed_optimizer=True), ON_HOST, 1e-5),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_takes_the_same_step(ranks: RankPool, tmp_path: Path, name: str) -> None:
    saved, saved_options, loaded, loaded_options, tolerance = RESUMED[name]
    model_dir = make_model(tmp_path / "model", tied=True, family="llama")
    expected = assemble(ranks.run(saved.world_size, save_after, saved, model_dir, saved_options))
    after = ranks.run(loaded.world_size, load_and_step, loaded, model_dir, loaded_options)
    assert all(own for _, own in after)
    for key, tensor in assemble([weights for weights, _ in after]).items():
        torch.testing.assert_close(tensor, expected[key], atol=tolerance, rtol=0, msg=key)


def stepped_after(rank: int, world_size: int, init_method: str, model_dir: Path) -> tuple[Weights, Weights]:
    """A step from weights that came after the optimizer was built, on the device and on the host."""
    found = []
    with world(SINGLE, rank, init_method):
        for options in (ON_DEVICE, ON_HOST):
            engine = build(ONE, model_dir, options=options)
            for _, parameter in engine.named_parameters():
                parameter.data.mul_(1.25)
            engine.optimizer.reload_model_params()
            engine.train_step(make_rows(), sft_objective(), denominator=50.0)
            found.append(parts(engine, gradients=False))
    return found[0], found[1]


def test_weights_that_come_later_are_stepped(ranks: RankPool, tmp_path: Path) -> None:
    ((expected, found),) = ranks.run(1, stepped_after, make_model(tmp_path / "model", family="llama"))
    for (name, _, on_device), (_, _, on_host) in zip(expected, found, strict=True):
        torch.testing.assert_close(on_host, on_device, atol=1e-6, rtol=0, msg=name)
