"""Checkpoints of the engine in several states and layouts, and what it does with numbers that are none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megarlhf.data.planning import PackingOptions, plan_micro_batches
from megarlhf.data.types import TrainingRows, training_rows
from megarlhf.engine.checkpoint import load_engine, save_engine
from megarlhf.engine.engine import NonFiniteError
from megarlhf.trainers.parity import (
    whole_gradients,
)
from megarlhf.trainers.parity_cases import (
    parity_case,
)
from tests.distributed.cases import assemble, make_rows, parts, sequences
from tests.distributed.layouts import LAYOUTS, MOE_LAYOUTS, SINGLE, Layout, build, world
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
            engine.train_step(make_rows(), parity_case("sft").objective, denominator=50.0)
        save_engine(engine, target)
        step = engine.train_step(make_rows(seed=6), parity_case("sft").objective, denominator=50.0)
        return parts(engine, gradients=False), step.learning_rate


def load_and_step(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, source: Path
) -> tuple[Weights, float]:
    """Load and take the step that save_after took."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        load_engine(engine, source)
        step = engine.train_step(make_rows(seed=6), parity_case("sft").objective, denominator=50.0)
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


CHANGES = {
    "PP2 to PP2-VPP2": (LAYOUTS["PP2"], LAYOUTS["PP2-VPP2"]),
    "PP2-VPP2 to one": (LAYOUTS["PP2-VPP2"], SINGLE),
    "uneven to TP2-SP": (LAYOUTS["PP2-uneven"], LAYOUTS["TP2-SP"]),
    "CP2 to DP2": (Layout(context=2, distributed_optimizer=True), LAYOUTS["DP2-distopt"]),
    "TP2 to DP2": (Layout(tensor=2, distributed_optimizer=True), LAYOUTS["DP2-distopt"]),
    "DP2 to TP2-SP": (LAYOUTS["DP2-distopt"], Layout(tensor=2, sequence_parallel=True, distributed_optimizer=True)),
    "overlap to CP2": (LAYOUTS["DP2-distopt-overlap"], Layout(context=2, distributed_optimizer=True)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_under_another_layout(ranks: RankPool, tmp_path: Path, change: str) -> None:
    saved, loaded = CHANGES[change]
    model_dir = make_model(tmp_path / "model", tied=True, family="llama")
    before = ranks.run(saved.world_size, save_after, saved, model_dir, tmp_path / "checkpoint", 2)
    after = ranks.run(loaded.world_size, load_and_step, loaded, model_dir, tmp_path / "checkpoint")
    expected, found = assemble([weights for weights, _ in before]), assemble([weights for weights, _ in after])
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=name)


EXPERT_CHANGES = {
    "one to PP2": (SINGLE, MOE_LAYOUTS["PP2"]),
    "one to TP2-SP": (SINGLE, MOE_LAYOUTS["TP2-SP"]),
    "one to DP2-overlap": (Layout(distributed_optimizer=True), MOE_LAYOUTS["DP2-overlap"]),
    "EP2 to EP4": (MOE_LAYOUTS["EP2-distopt"], Layout(data=4, expert=4, distributed_optimizer=True)),
    "EP2 to TP2-SP-EP2": (MOE_LAYOUTS["EP2"], MOE_LAYOUTS["TP2-SP-EP2-ETP1"]),
}


@pytest.mark.parametrize("change", EXPERT_CHANGES)
def test_resume_with_experts(ranks: RankPool, tmp_path: Path, change: str) -> None:
    """Where experts stay whole, or stay dealt out."""
    saved, target = EXPERT_CHANGES[change]
    model_dir = make_model(tmp_path / "model", family="mixtral")
    before = ranks.run(saved.world_size, save_after, saved, model_dir, tmp_path / "checkpoint", 2)
    after = ranks.run(target.world_size, load_and_step, target, model_dir, tmp_path / "checkpoint")
    expected, found = assemble([weights for weights, _ in before]), assemble([weights for weights, _ in after])
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(("saved", "loaded"), [("EP2-distopt", "DP2"), ("DP2", "EP2-distopt"), ("EP2", "single")])
def test_weights_alone_cross_the_border_of_expert_parallelism(
    ranks: RankPool, tmp_path: Path, saved: str, loaded: str
) -> None:
    layouts = MOE_LAYOUTS | {"DP2": Layout(data=2, distributed_optimizer=True), "single": SINGLE}
    model_dir = make_model(tmp_path / "model", family="mixtral")
    trained = ranks.run(layouts[saved].world_size, save_weights, layouts[saved], model_dir, tmp_path / "checkpoint")
    found = ranks.run(layouts[loaded].world_size, load_weights, layouts[loaded], model_dir, tmp_path / "checkpoint")
    expected = assemble(trained)
    for name, tensor in assemble([weights for weights, _ in found]).items():
        assert torch.equal(tensor, expected[name]), name
    assert all(learning_rate == pytest.approx(1e-3) for _, learning_rate in found)


def save_weights(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, target: Path
) -> Weights:
    """Train, save, and return the weights."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        engine.train_step(make_rows(), parity_case("sft").objective, denominator=50.0)
        save_engine(engine, target)
        return parts(engine, gradients=False)


def load_weights(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, source: Path
) -> tuple[Weights, float]:
    """Load without the optimizer, return the weights, and see that a step and a save still work."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        load_engine(engine, source, with_optimizer=False)
        loaded = parts(engine, gradients=False)
        save_engine(engine, source.with_name("again"))
        assert engine.scheduler.num_steps == 1
        return loaded, engine.train_step(make_rows(), parity_case("sft").objective, denominator=50.0).learning_rate


def balance_gradients(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path
) -> tuple[Weights, dict[str, float]]:
    """Gradients of the supervised loss with the load-balancing loss beside it, and the routers' metrics."""
    with world(layout, rank, init_method):
        engine, rows = build(layout, model_dir), balanced_rows()
        with whole_gradients(engine):
            batches = engine.micro_batches(rows)
            _, metrics, _ = engine.accumulate_gradients(batches, parity_case("sft").objective, denominator=30.0)
        return parts(engine, gradients=True), metrics


def balanced_rows() -> TrainingRows:
    """Two micro-batches of 48 tokens, which no layout needs to pad."""
    generator = torch.Generator().manual_seed(9)
    return training_rows([torch.randint(3, 100, (13,), generator=generator).tolist() for _ in range(8)], [3] * 8)


def balance_loss(probs: Tensor) -> Tensor:
    """[t, 4] router probabilities, of which three are chosen -> E * sum_e f_e P_e."""
    chosen = torch.zeros_like(probs).scatter(-1, probs.topk(3).indices, 1.0)
    return 4 * (chosen.mean(0) / 3 * probs.mean(0)).sum()


def test_balance_loss_is_that_of_its_formula_in_every_layout(ranks: RankPool, tmp_path: Path) -> None:
    """coefficient * E * sum_e f_e P_e for each micro-batch and layer, mean over micro-batches."""
    model_dir = make_model(tmp_path / "model", family="mixtral")
    options = {"moe_aux_loss_coeff": 0.5, "max_tokens": 48}
    plain, _ = ranks.run(1, balance_gradients, Layout(max_tokens=48), model_dir)[0]
    single, metrics = ranks.run(1, balance_gradients, Layout(**options), model_dir)[0]
    expected = assemble([single])
    added = {name: expected[name] - gradient for name, gradient in assemble([plain]).items()}

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    rows = balanced_rows()
    sizes = rows.lengths, rows.prompt_lengths, rows.unit_ids
    (batches,) = plan_micro_batches(*sizes, num_ranks=1, packing=PackingOptions(max_tokens=48, share_prefix=False))
    total: Tensor | float = 0.0
    seen: list[list[Tensor]] = [[] for _ in range(4)]
    for batch in batches:
        ids = torch.tensor([sequences(rows)[i][0][:-1] for i in batch])
        for layer, logits in enumerate(model(ids, output_router_logits=True).router_logits):
            seen[layer].append(logits.reshape(-1, 4).softmax(-1))
            total = total + balance_loss(seen[layer][-1])
    (0.5 * total / len(batches)).backward()
    for layer in range(4):
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        gate = model.model.layers[layer].mlp.gate.weight.grad
        torch.testing.assert_close(added[name], gate, atol=2e-6, rtol=1e-4)
        assert float(gate.abs().max()) > 1e-3
    assert 0.9 <= metrics["moe_balance_loss"] < 1.5 and metrics["moe_load_min"] <= 1.0 <= metrics["moe_load_max"]
    whole = [float(balance_loss(torch.cat(probs).detach())) for probs in seen]
    assert metrics["moe_balance_loss"] == pytest.approx(sum(whole) / 4, abs=1e-5)

    for name in ("TP2-SP", "PP2", "CP2-EP2", "EP2"):
        layout = replace(MOE_LAYOUTS[name], **options)
        found = ranks.run(layout.world_size, balance_gradients, layout, model_dir)
        for weight, gradient in assemble([gradients for gradients, _ in found]).items():
            torch.testing.assert_close(gradient, expected[weight], atol=2e-6, rtol=0, msg=f"{name} {weight}")
        for key, value in metrics.items():
            assert found[0][1][key] == pytest.approx(value, abs=1e-5), (name, key)


def poisoned_step(rank: int, world_size: int, init_method: str, model_dir: Path) -> tuple[str, bool]:
    """An advantage that is NaN: the message, and whether every weight is as it was."""
    with world(SINGLE, rank, init_method):
        engine, rows = build(SINGLE, model_dir), make_rows()
        rows.fields["advantages"][20] = np.nan
        before = [p.detach().clone() for _, p in engine.named_parameters()]
        with pytest.raises(NonFiniteError) as raised:
            engine.train_step(rows, parity_case("actor").objective, denominator=9.0)
        return str(raised.value), all(
            torch.equal(a, b) for a, b in zip(before, (p for _, p in engine.named_parameters()), strict=True)
        )


def test_a_loss_that_is_no_number_stops_before_the_weights_change(ranks: RankPool, tmp_path: Path) -> None:
    message, unchanged = ranks.run(1, poisoned_step, make_model(tmp_path / "model", tied=True, family="llama"))[0]
    assert "loss=nan" in message and unchanged
