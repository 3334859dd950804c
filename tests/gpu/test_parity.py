"""The engine on the device against Transformers on the CPU, and against our own engine there.

In float32 both round 24 bits, in another order. In bfloat16 the measure is what bfloat16 costs Transformers' own model:
the engine, whose products, norms and attention round in other places, may be a little further off than that.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.engine.optimizer import OptimizerOptions
from megarlhf.parallel.device import current_device
from megarlhf.trainers.parity import (
    hf_parts,
    main_parts,
)
from megarlhf.trainers.parity_cases import (
    ObjectiveName,
    fitting,
    parity_case,
)
from tests.distributed.cases import Parts, assemble, by_row, compare_case, make_rows, reference_case
from tests.distributed.layouts import SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.gpu.devices import needs_compiler, on_cpu_and_gpu, on_gpu
from tests.gpu.oracle import Named, Results, transformers_results
from tests.tiny_models import make_model

TEMPERATURE = 0.8
OPTIONS = OptimizerOptions(
    learning_rate=1e-3,
    total_steps=20,
    lr_warmup_ratio=0.0,
    lr_decay_style="constant",
    adam_eps=1e-4,  # large, so that a step is a smooth function of the gradient
)


def engine_results(rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path) -> Results:
    """The same numbers of the real engine, on whatever this process computes on."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir, temperature=TEMPERATURE, options=OPTIONS)
        assert {p.device for _, p in engine.named_parameters()} == {current_device()}
        rows = fitting(engine, make_rows())
        denominator, objective = float(rows.num_targets.sum()), parity_case("sft").objective
        before = engine.log_probs(rows)
        loss, _, _ = engine.accumulate_gradients(engine.micro_batches(rows), objective, denominator=denominator)
        gradients = on_host([*hf_parts(engine, gradients=True)])
        main = on_host([*main_parts(engine)])
        grad_norm = engine.train_step(rows, objective, denominator=denominator).grad_norm
        stepped = on_host([*main_parts(engine)])
        after = engine.log_probs(rows)
    pairs = zip(stepped, main, strict=True)
    return Results(
        log_probs=torch.cat([values for _, values in sorted(by_row(rows, before).items())]),
        loss=loss,
        gradients=assemble([gradients]),
        grad_norm=grad_norm,
        movement=assemble([[(name, index, new - old) for (name, index, new), (_, _, old) in pairs]]),
        after=torch.cat([values for _, values in sorted(by_row(rows, after).items())]),
    )


def on_host(parts: Parts) -> Parts:
    """Copies of the numbers as they are now, on the CPU."""
    return [(name, index, part.to("cpu", copy=True)) for name, index, part in parts]


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far one side is off the other: absolute in log-probs and loss, else relative."""

    log_probs: float
    loss: float
    gradients: float  # worst tensor's largest difference, by its largest gradient (at least 1/1000 of the model's)
    grad_norm: float
    movement: float  # length of the difference, by that of the movement: 1 where no step is taken
    after: float

    def times(self, factor: float) -> "Errors":
        """So much larger. The errors of single numbers, which may cancel by luck, become those of what they sum up."""
        single = replace(self, loss=self.log_probs, grad_norm=self.movement)
        return Errors(**{field.name: factor * getattr(single, field.name) for field in fields(self)})


def errors(found: Results, expected: Results) -> Errors:
    assert set(found.gradients) == set(expected.gradients) == set(found.movement) == set(expected.movement)
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    worst = 0.0
    for name, gradient in expected.gradients.items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        worst = max(worst, largest_difference(found.gradients[name], gradient) / scale)
    names = sorted(expected.movement)
    return Errors(
        log_probs=largest_difference(found.log_probs, expected.log_probs),
        loss=abs(found.loss - expected.loss),
        gradients=worst,
        grad_norm=abs(found.grad_norm / expected.grad_norm - 1.0),
        movement=relative_length(found.movement, expected.movement, names),
        after=largest_difference(found.after, expected.after),
    )


def largest_difference(a: Tensor, b: Tensor) -> float:
    """A number that is none counts as infinitely far off."""
    return float((a - b).abs().nan_to_num(nan=torch.inf).max())


def relative_length(found: Named, expected: Named, names: list[str]) -> float:
    flat = torch.cat([expected[name].flatten().double() for name in names])
    difference = torch.cat([found[name].flatten().double() for name in names]) - flat
    return float(difference.norm() / flat.norm())


def check(found: Errors, allowed: Errors) -> None:
    """Every number at most what is allowed, all of them in the message."""
    over = [field.name for field in fields(Errors) if not getattr(found, field.name) <= getattr(allowed, field.name)]
    assert not over, f"{over} too far off: {found}, allowed {allowed}"


FLOAT32 = Errors(log_probs=2e-5, loss=5e-6, gradients=1e-4, grad_norm=2e-5, movement=1e-3, after=2e-4)
BFLOAT16_MARGIN = 3.0
FAMILIES = {
    "llama": ("llama", Layout()),
    "llama, compiled": ("llama", Layout(compiled=True)),
    "qwen3": ("qwen3", Layout()),
    "gemma3": ("gemma3", Layout()),
    "mixtral": ("mixtral", Layout()),
    "deepseek-v3": ("deepseek-v3", Layout()),
}

COMPILED = ("llama, compiled", "deepseek-v3")  # the latter by Megatron-Core itself: router.py, _apply_expert_bias


def marked(names: Iterable[str]) -> list[Any]:
    """Names of FAMILIES as parameters, of which some need a compiler."""
    return [pytest.param(name, marks=needs_compiler if name in COMPILED else ()) for name in names]


def compare_with_transformers(ranks: RankPool, root: Path, family: str, layout: Layout) -> tuple[Errors, Errors]:
    """Errors of the engine, and those of Transformers in the engine's dtype, both against Transformers in float32."""
    model_dir, rows = make_model(root / "model", family=family), make_rows()
    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    exact, rounded = (
        transformers_results(
            model_dir,
            rows,
            OPTIONS,
            root / str(computing),
            temperature=TEMPERATURE,
            weights=dtype,
            computing=computing,
        )
        for computing in (torch.float32, dtype)
    )
    assert exact.grad_norm > 0.1 and largest_difference(exact.after, exact.log_probs) > 100 * FLOAT32.log_probs
    return errors(ranks.run(1, engine_results, layout, model_dir)[0], exact), errors(rounded, exact)


@on_cpu_and_gpu
def test_float32_is_that_of_transformers(ranks: RankPool, tmp_path: Path, device: str) -> None:
    found, _ = compare_with_transformers(ranks, tmp_path, *FAMILIES["llama"])
    check(found, FLOAT32)


@on_gpu
@pytest.mark.parametrize("name", marked(name for name in FAMILIES if name != "llama"))
def test_float32_of_other_layers(ranks: RankPool, tmp_path: Path, device: str, name: str) -> None:
    """On the CPU tests/conformance has all of them."""
    found, _ = compare_with_transformers(ranks, tmp_path, *FAMILIES[name])
    check(found, FLOAT32)


@on_cpu_and_gpu
def test_bfloat16_costs_what_it_costs_transformers(ranks: RankPool, tmp_path: Path, device: str) -> None:
    found, transformers = compare_with_transformers(ranks, tmp_path, "llama", Layout(bf16=True))
    assert transformers.log_probs > 100 * FLOAT32.log_probs, "bfloat16 shows"
    check(found, transformers.times(BFLOAT16_MARGIN))


@on_gpu
@pytest.mark.parametrize("name", marked(["llama, compiled", "qwen3", "gemma3"]))
def test_bfloat16_of_other_layers(ranks: RankPool, tmp_path: Path, device: str, name: str) -> None:
    """Without experts: where rounding makes a router choose another, nothing is close."""
    family, layout = FAMILIES[name]
    found, transformers = compare_with_transformers(ranks, tmp_path, family, replace(layout, bf16=True))
    check(found, transformers.times(BFLOAT16_MARGIN))


OBJECTIVES: tuple[ObjectiveName, ...] = ("actor", "critic")
ALLOWED = {
    "forward": FLOAT32.log_probs,
    "training": FLOAT32.log_probs,
    "loss": FLOAT32.loss,
    "metrics": FLOAT32.log_probs,
    "by tensor": FLOAT32.gradients,
    "movement": FLOAT32.movement,
    "after": FLOAT32.after,
    "reference": FLOAT32.log_probs,
}


@on_gpu
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_policy_and_value_losses_are_those_of_a_cpu_process(
    ranks: RankPool, cpu_ranks: RankPool, tmp_path: Path, device: str, family: str
) -> None:
    """Every term of both losses, and the reference model, with the rows' fields on the GPU."""
    model_dir = make_model(tmp_path / "model", family=family)
    targets = {objective: tmp_path / objective for objective in OBJECTIVES}
    scales = cpu_ranks.run(1, reference_case, SINGLE, model_dir, targets)[0]
    found = ranks.run(1, compare_case, SINGLE, model_dir, targets)[0]
    for objective in OBJECTIVES:
        assert scales[objective]["gradients"] > 1e-2 and scales[objective]["moved"] > 1e-3
        over = {name: found[objective][name] for name in ALLOWED if not found[objective][name] <= ALLOWED[name]}
        assert not over, f"{objective}: {over} too far off, allowed {ALLOWED}"
