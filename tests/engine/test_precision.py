"""FP8 inside the engine: layouts, the guard and its fallback, checkpoints. Recipes: tests/models/test_fp8.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.config.precision import PrecisionArguments
from megarlhf.engine.checkpoint import load_engine, save_engine
from megarlhf.engine.engine import MegatronEngine
from megarlhf.trainers.parity_cases import parity_case
from tests.distributed.cases import Parts, assemble, make_rows, parts
from tests.distributed.layouts import LAYOUTS, MOE_LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.fp8_oracle import by_blocks
from tests.tiny_models import make_model

FP8 = PrecisionArguments(train_dtype="fp8", log_prob_dtype="fp8", fp8_recipe="tensorwise")
DELAYED = PrecisionArguments(
    train_dtype="fp8", fp8_recipe="delayed", fp8_amax_history_len=3, fp8_amax_compute_algo="max"
)
BLOCKS = PrecisionArguments(train_dtype="fp8", log_prob_dtype="fp8", fp8_recipe="blockwise", fp8_format="e4m3")
DENOMINATOR = 50.0


def step(engine: MegatronEngine, seed: int = 5) -> float:
    return engine.train_step(make_rows(seed=seed), parity_case("sft").objective, denominator=DENOMINATOR).loss


def trained(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, steps: int
) -> tuple[list[float], Parts, dict[str, float]]:
    """Losses, weights after the steps, and the metrics of the last."""
    with world(layout, rank, init_method):
        engine, losses, found = build(layout, model_dir), [], {}
        for number in range(steps):
            losses.append(step(engine, seed=5 + number))
            found, _ = engine.precision.report()
        return losses, parts(engine, gradients=False), found


def differences(ranks: RankPool, model_dir: Path, one: Layout, other: Layout, steps: int = 2) -> tuple[float, float]:
    """Of losses the largest, of all weights the norm over that of what training has moved them."""
    found = [ranks.run(layout.world_size, trained, layout, model_dir, steps) for layout in (one, other)]
    start = ranks.run(1, trained, replace(SINGLE, max_tokens=one.max_tokens), model_dir, 0)
    begun, (first, second) = assemble([start[0][1]]), [assemble([part for _, part, _ in each]) for each in found]
    losses = max(abs(a - b) for a, b in zip(found[0][0][0], found[1][0][0], strict=True))
    norms = [sum(float((first[name] - to[name]).norm() ** 2) for name in begun) for to in (second, begun)]
    return losses, (norms[0] / norms[1]) ** 0.5


def in_fp8(layout: Layout, precision: PrecisionArguments) -> Layout:
    return replace(layout, precision=precision)


def spoiled(rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path) -> Any:
    """Losses and what the phases say, with an infinite number in one activation of the second of three steps."""
    with world(layout, rank, init_method):
        engine, told = build(layout, model_dir), []
        rows = make_rows()
        for number in range(3):
            handle = None
            if number == 1 and rank == world_size - 1:
                first = next(m for m in engine.chunks[0].modules() if type(m).__name__ == "SegmentNorm")

                def poison(module: Any, inputs: Any, output: Tensor) -> Tensor:
                    if engine.precision._layers.on:  # the second try finds what it would have found
                        output = output.clone()
                        output.view(-1)[7] = torch.inf
                    return output

                handle = first.register_forward_hook(poison)
            log_probs = engine.log_probs(rows).values.sum() if number == 1 else 0.0
            told.append((step(engine), float(log_probs), *engine.precision.report()))
            if handle is not None:
                handle.remove()
        return told


@pytest.mark.parametrize("name", ["one", "PP2", "DP2"])
def test_an_overflow_leaves_fp8_and_the_pass_is_taken_again(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """In both phases, on all ranks, for good; the step is that of a run without FP8."""
    layout, model_dir = (LAYOUTS | {"one": SINGLE})[name], make_model(tmp_path / "model", family="llama")
    both = replace(FP8, fp8_fallback_steps=0)
    told = ranks.run(layout.world_size, spoiled, in_fp8(layout, both), model_dir)
    decided = [[(loss, *rest) for loss, _, *rest in rank] for rank in told]  # log-probs are of own rows
    assert all(rank == decided[0] for rank in decided[1:])
    assert [found["train/fp8"] for _, _, found, _ in told[0]] == [1, 0, 0]
    assert [found["log_prob/fp8"] for _, _, found, _ in told[0]] == [1, 0, 0]
    said = told[0][1][3]
    assert len(said) == 2 and said[0].startswith("log_prob leaves fp8 for fp32 for the rest of the run")
    assert said[1].startswith("train leaves fp8 for fp32 for the rest of the run") and "not finite" in said[1]
    losses = [loss for loss, *_ in told[0]]
    assert losses[2] < losses[1] < losses[0], "the run still learns"


def test_fp8_is_near_fp32_and_not_it(ranks: RankPool, tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", family="llama")
    loss, _ = differences(ranks, model_dir, SINGLE, in_fp8(SINGLE, FP8), steps=1)
    assert 1e-5 < loss < 0.05


@pytest.mark.parametrize(("name", "steps"), [("PP2", 2), ("recompute-full", 2), ("TP2-SP", 1)])
def test_delayed_scales_agree_in_every_layout(ranks: RankPool, tmp_path: Path, name: str, steps: int) -> None:
    """The largest numbers are those of all ranks, and recomputed layers have the scales that they had.

    With scales of a rank's own, weights differ by 0.18 of their way at TP2. Sums are in another order there, so later
    numbers between two of FP8's round to the other: 0.02 after a second step.
    """
    model_dir = make_model(tmp_path / "model", family="llama")
    loss, weights = differences(ranks, model_dir, in_fp8(SINGLE, DELAYED), in_fp8(LAYOUTS[name], DELAYED), steps)
    assert loss < 1e-6 and weights < 1e-4, (loss, weights)


@pytest.mark.parametrize("precision", [FP8, BLOCKS], ids=["tensorwise", "blockwise"])
def test_stages_do_not_matter(ranks: RankPool, tmp_path: Path, precision: PrecisionArguments) -> None:
    model_dir = make_model(tmp_path / "model", family="llama")
    loss, weights = differences(ranks, model_dir, in_fp8(SINGLE, precision), in_fp8(LAYOUTS["PP2"], precision))
    assert loss < 1e-6 and weights < 1e-4


def save_and_go_on(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, target: Path, spoil: bool
) -> tuple[Parts, Any]:
    """Two steps, a checkpoint, and another two: their weights and the state of FP8."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        step(engine)
        if spoil:
            engine.precision.fall_back("train", "a test")
        step(engine, seed=6)
        engine.precision.report()
        save_engine(engine, target)
        for seed in (7, 8):
            step(engine, seed=seed)
            engine.precision.report()
        return parts(engine, gradients=False), engine.precision.state()


def load_and_go_on(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, source: Path
) -> tuple[Parts, Any]:
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        load_engine(engine, source)
        for seed in (7, 8):
            step(engine, seed=seed)
            engine.precision.report()
        return parts(engine, gradients=False), engine.precision.state()


@pytest.mark.parametrize(
    ("saved", "loaded", "spoil"),
    [("one", "one", False), ("PP2", "one", False), ("one", "one", True), ("DP2-distopt", "DP2-distopt", False)],
)
def test_resume_in_fp8_is_exact(ranks: RankPool, tmp_path: Path, saved: str, loaded: str, spoil: bool) -> None:
    """Bit for bit, scales and history too, in FP8 and in the middle of a fallback."""
    precision = replace(DELAYED, fp8_fallback_steps=3)
    layouts = {name: in_fp8(layout, precision) for name, layout in (LAYOUTS | {"one": SINGLE}).items()}
    model_dir = make_model(tmp_path / "model", family="llama")
    arguments = (layouts[saved], model_dir, tmp_path / "checkpoint", spoil)
    before = ranks.run(layouts[saved].world_size, save_and_go_on, *arguments)
    after = ranks.run(layouts[loaded].world_size, load_and_go_on, layouts[loaded], model_dir, tmp_path / "checkpoint")
    expected, found = assemble([part for part, _ in before]), assemble([part for part, _ in after])
    tolerance = 0.0 if saved == loaded else 1e-5  # the norm of the gradient is summed in another order
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=0, msg=name)
    (_, kept), (_, state) = before[0], after[0]
    assert kept["phases"] == state["phases"]
    assert kept["phases"]["train"]["fallbacks"] == spoil
    assert kept["layers"].keys() == state["layers"].keys() and kept["layers"]
    for name, (history, scale) in kept["layers"].items():
        for one, other in zip((history, scale), state["layers"][name], strict=True):
            torch.testing.assert_close(one, other, atol=0, rtol=0 if saved == loaded else 1e-3, msg=name)
        assert spoil or (scale != 1).all(), "every operand has had its scale"


def test_scales_of_experts_are_saved(ranks: RankPool, tmp_path: Path) -> None:
    """Names have the expert's number in the model, not on the rank."""
    layout, model_dir = in_fp8(MOE_LAYOUTS["EP2"], DELAYED), make_model(tmp_path / "model", family="mixtral")
    before = ranks.run(2, save_and_go_on, layout, model_dir, tmp_path / "checkpoint", False)
    after = ranks.run(2, load_and_go_on, layout, model_dir, tmp_path / "checkpoint")
    expected, found = assemble([part for part, _ in before]), assemble([part for part, _ in after])
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(".local_experts.3." in name for name in after[0][1]["layers"])




def weights_kept(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path
) -> list[tuple[str, bool]]:
    """Of each matrix of the decoder whether it is what FP8 holds of it, after two steps."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        for _ in range(2):
            step(engine)
        return [
            (name, torch.equal(by_blocks(parameter.data, "e4m3", 128, 128).to(parameter.dtype), parameter.data))
            for name, parameter in engine.named_parameters()
            if parameter.dim() == 2
        ]


@pytest.mark.parametrize("overlap", [False, True])
def test_weights_are_kept_in_fp8(ranks: RankPool, tmp_path: Path, overlap: bool) -> None:
    """fp8_param_gather; main weights are finer, else a small step would be lost at once."""
    precision = replace(BLOCKS, fp8_param_gather=True, first_last_layers_bf16=True, num_layers_at_end_in_bf16=0)
    layout = Layout(data=2, distributed_optimizer=True, bf16=True, overlap=overlap, precision=precision)
    model_dir = make_model(tmp_path / "model", family="llama")
    for kept in ranks.run(2, weights_kept, layout, model_dir):
        rounded = {name for name, is_rounded in kept if is_rounded}
        assert rounded == {name for name, _ in kept if ".linear_" in name and ".layers.0." not in name}


def guarded(rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, fault: str) -> Any:
    """What the phases say, step by step, with a fault in the second of five."""
    with world(layout, rank, init_method):
        engine, told = build(layout, model_dir), []
        for number in range(5):
            if number == 1 and fault == "jump":
                next(p for n, p in engine.named_parameters() if "final_layernorm" not in n and "norm" in n).data *= 400
            loss = step(engine, seed=5 + number)
            told.append((loss, *engine.precision.report()))
        return told


def test_a_jump_past_the_scales_leaves_fp8_for_a_while(ranks: RankPool, tmp_path: Path) -> None:
    """Delayed scales are of the micro-batches before: 400 times as large, many numbers are cut."""
    layout = in_fp8(LAYOUTS["DP2"], replace(DELAYED, fp8_fallback_steps=2, fp8_max_saturated=0.015))
    model_dir = make_model(tmp_path / "model", family="llama")
    told, other = ranks.run(2, guarded, layout, model_dir, "jump")
    assert told == other, "ranks decide alike"
    assert [found["train/fp8"] for _, found, _ in told] == [1, 0, 0, 1, 1]
    assert [found["train/fallbacks"] for _, found, _ in told] == [0, 1, 1, 1, 1]
    said = [sentence for _, _, sentences in told for sentence in sentences]
    assert "train leaves fp8 for fp32 for 2 steps (fp8_fallback_steps=2)" in said[0]
    assert "are beyond FP8's largest, more than fp8_max_saturated=0.015" in said[0]
    assert "train computes in fp8 again" in said[1] and len(said) == 2
    assert told[1][1]["train/saturated_frac"] > 0.015 > told[3][1]["train/saturated_frac"], "scales know by then"
