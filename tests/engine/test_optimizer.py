"""Optimizer steps against torch.optim.AdamW on Transformers' gradients, and the learning rate of every step."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, get_scheduler

from megarlhf.config.aliases import ALIASES
from megarlhf.data.packing import join_values
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import StepResult
from megarlhf.engine.optimizer import OptimizerOptions, build_scheduler, main_weight
from megarlhf.trainers.sft import sft_objective
from tests.distributed.cases import Parts, assemble, make_rows, parts, sequences
from tests.distributed.layouts import Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

DENOMINATOR, TEMPERATURE, STEPS = 40.0, 0.7, 6
NONE = join_values([])
# Every number differs from its default. The warm-up takes two steps and a bit, so three.
OPTIONS = OptimizerOptions(
    learning_rate=4e-3,
    total_steps=STEPS,
    lr_warmup_ratio=0.36,
    min_lr_ratio=0.25,
    adam_beta1=0.7,
    adam_beta2=0.85,
    adam_eps=2e-3,
    weight_decay=0.6,
    clip_grad=0.15,
    use_distributed_optimizer=False,
)


def written_out_rate(step: int, options: OptimizerOptions) -> float:
    """Learning rate of optimizer step 1, 2, ...: a line to the top, then half a cosine to the floor, or level."""
    highest, total = options.learning_rate, options.total_steps
    warmup = min(math.ceil(options.lr_warmup_ratio * total), total - 1)
    if step <= warmup:
        return highest * step / warmup
    if options.lr_decay_style == "constant":
        return highest
    lowest = highest * options.min_lr_ratio
    place = min(1.0, (step - warmup) / (total - warmup))
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * place)) / 2


SCHEDULES = {
    "cosine": OPTIONS,
    "constant": replace(OPTIONS, lr_decay_style="constant"),
    "3 iterations of 4 updates": replace(OPTIONS, total_steps=3 * 4, lr_warmup_ratio=0.25, min_lr_ratio=0.0),
    "no warm-up": replace(OPTIONS, lr_warmup_ratio=0.0),
    "all warm-up": replace(OPTIONS, lr_warmup_ratio=1.0),
    "one step": replace(OPTIONS, total_steps=1),
    "a role that never steps": replace(OPTIONS, total_steps=0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_of_every_step_is_the_formula(name: str) -> None:
    """Before each optimizer step the schedule moves once; past the end the rate stays at its last value."""

    class Groups:
        param_groups: list[dict[str, Any]] = [{"wd_mult": 1.0}, {"wd_mult": 0.0}]

    options = SCHEDULES[name]
    scheduler, found = build_scheduler(Groups, options), []
    for _ in range(options.total_steps + 2):
        scheduler.step(1)
        found.append(Groups.param_groups[0]["lr"])
        assert Groups.param_groups[1]["lr"] == found[-1]
        assert [group["weight_decay"] for group in Groups.param_groups] == [0.6, 0.0]
    total = max(1, options.total_steps)
    expected = [written_out_rate(step, replace(options, total_steps=total)) for step in range(1, len(found) + 1)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_learning_rates_by_hand() -> None:
    """Warm-up of 3 to 4e-3, then cosines of 60, 120 and 180 degrees down to 1e-3."""
    assert [written_out_rate(step, OPTIONS) for step in range(1, 7)] == pytest.approx(
        [4e-3 / 3, 8e-3 / 3, 4e-3, 3.25e-3, 1.75e-3, 1e-3]
    )


@pytest.mark.parametrize("name", [*ALIASES["lr_scheduler"].choices])
def test_schedules_are_those_of_transformers(name: str) -> None:
    """Transformers' step 0 has the rate 0 of the warm-up's start; here no step is spent on that."""

    class Groups:
        param_groups: list[dict[str, Any]] = [{"wd_mult": 1.0}]

    warmup, total = (0 if name == "constant" else 3), 12
    sets = ALIASES["lr_scheduler"].choices[name]
    options = OptimizerOptions(
        learning_rate=2e-3,
        total_steps=total,
        lr_warmup_ratio=warmup / total,
        lr_decay_style=sets["lr_decay_style"],
        min_lr_ratio=float(sets.get("min_lr_ratio", 0.1)),
    )
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    special = {"min_lr_rate": 0.1} if name == "cosine_with_min_lr" else None
    lambdas = get_scheduler(name, theirs, warmup, total, scheduler_specific_kwargs=special).lr_lambdas
    ours, found = build_scheduler(Groups, options), []
    for _ in range(total):
        ours.step(1)
        found.append(Groups.param_groups[0]["lr"])
    assert found == pytest.approx([2e-3 * lambdas[0](step) for step in range(1, total + 1)], rel=1e-12)


def moments(engine: MegatronEngine, name: str) -> Parts:
    """AdamW's running means of one process under the weights' HF names."""
    (inner,) = engine.optimizer.chained_optimizers
    found: Parts = []
    for bound in engine.weights.local:
        main = bound.param
        if hasattr(inner, "model_param_group_index_map"):
            group, order = inner.model_param_group_index_map[bound.param]
            main = inner.optimizer.param_groups[group]["params"][order]
        state = inner.optimizer.state[main][name].view_as(bound.param)
        for shard in engine.weights.shards(bound, state):
            whole = zip(engine.weights.hf_shapes[shard.hf_name], shard.index, strict=True)
            shape = tuple(len(range(size)[part]) for size, part in whole)
            found.append((shard.hf_name, shard.index, shard.view.reshape(shape).clone()))
    return found


def take_steps(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, options: OptimizerOptions
) -> tuple[list[StepResult], Parts, dict[str, Parts]]:
    """What each step reports, the weights after the last one, and one process's running means."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir, options=options, temperature=TEMPERATURE)
        results = [
            replace(engine.train_step(make_rows(seed=step), sft_objective(), denominator=DENOMINATOR), outputs=NONE)
            for step in range(STEPS)
        ]
        names = ("exp_avg", "exp_avg_sq") if world_size == 1 else ()
        return results, parts(engine, gradients=False), {name: moments(engine, name) for name in names}


def transformers_model(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, experts_implementation="eager")


def transformers_loss(model: Any, step: int) -> Tensor:
    """The supervised loss of a step's rows, one row at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for tokens, prompt_length in sequences(make_rows(seed=step)):
        ids = torch.tensor(tokens)
        logits = model(ids[None, :-1]).logits[0] / TEMPERATURE
        log_probs = logits.log_softmax(-1).gather(1, ids[1:, None])[prompt_length - 1 :]
        total = total - log_probs.double().sum()
    return total / DENOMINATOR


def decays(name: str) -> bool:
    return not ("norm" in name or name.endswith("bias"))


def adamw(weights: dict[str, Tensor], options: OptimizerOptions) -> torch.optim.AdamW:
    """torch's own, with weight decay for matrices alone; its rate is set before every step."""
    groups = [[p for name, p in weights.items() if decays(name) == decayed] for decayed in (True, False)]
    assert all(groups)
    return torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": options.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        lr=math.inf,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
    )


def set_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def transformers_steps(model_dir: Path, options: OptimizerOptions) -> tuple[Any, torch.optim.AdamW, list[list[float]]]:
    """The same steps in float64: the model, its optimizer, and loss, gradient norm and rate of each step."""
    model = transformers_model(model_dir)
    optimizer, numbers = adamw(dict(model.named_parameters()), options), []
    for step in range(STEPS):
        loss = transformers_loss(model, step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad or math.inf)
        set_rate(optimizer, written_out_rate(step + 1, options))
        optimizer.step()
        numbers.append([loss.item(), norm.item(), written_out_rate(step + 1, options)])
    return model, optimizer, numbers


CONSTANT = replace(OPTIONS, lr_decay_style="constant")
RUNS = {
    "clipped": ("qwen2", Layout(), OPTIONS),
    "clip that does not bite, distopt": (
        "qwen2",
        Layout(distributed_optimizer=True),
        replace(CONSTANT, clip_grad=50.0),
    ),
    "no clip, DP2": ("qwen2", Layout(data=2), replace(CONSTANT, clip_grad=0.0)),
    "clipped, DP2-distopt-overlap": ("qwen2", Layout(data=2, distributed_optimizer=True, overlap=True), OPTIONS),
    "clipped, EP2": ("mixtral", Layout(data=2, expert=2), OPTIONS),
    "clipped, half on the host": (
        "qwen2",
        Layout(distributed_optimizer=True),
        replace(OPTIONS, optimizer_cpu_offload=True, optimizer_offload_fraction=0.5),
    ),
    "clipped, all on the host, DP2-overlap": (
        "qwen2",
        Layout(data=2, distributed_optimizer=True, overlap=True),
        replace(OPTIONS, optimizer_cpu_offload=True, overlap_cpu_optimizer_d2h_h2d=True),
    ),
    "clipped, all on the host, EP2": (
        "mixtral",
        Layout(data=2, expert=2, distributed_optimizer=True),
        replace(OPTIONS, optimizer_cpu_offload=True),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_steps_are_those_of_adamw_on_transformers_gradients(ranks: RankPool, tmp_path: Path, name: str) -> None:
    family, layout, options = RUNS[name]
    model_dir = make_model(tmp_path / "model", family=family, num_hidden_layers=2)
    found = ranks.run(layout.world_size, take_steps, layout, model_dir, options)
    model, optimizer, numbers = transformers_steps(model_dir, options)
    clipped = [norm > options.clip_grad for _, norm, _ in numbers]
    assert all(clipped) if options.clip_grad < 50 else not any(clipped)
    for results, _, _ in found:
        for result, (loss, norm, rate) in zip(results, numbers, strict=True):
            assert (result.loss, result.grad_norm) == pytest.approx((loss, norm), rel=2e-5)
            assert result.learning_rate == pytest.approx(rate, rel=1e-12)
    model.save_pretrained(tmp_path / "after")  # under the names that files have, where experts lie apart
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "after"))
    weights = assemble([weights for _, weights, _ in found])
    assert weights.keys() == after.keys()
    for key, weight in after.items():
        moved = float((weight - before[key]).abs().max())
        assert moved > 1e-4, "each weight moves far enough to tell"
        torch.testing.assert_close(weights[key].double(), weight, atol=2e-3 * moved, rtol=0, msg=key)
    for moment, state in found[0][2].items():
        whole = assemble([state])
        for key, parameter in model.named_parameters():
            expected = optimizer.state[parameter][moment]
            atol = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(whole[key].double(), expected, atol=atol, rtol=0, msg=f"{moment} {key}")


def norms_of_a_step(rank: int, world_size: int, init_method: str, model_dir: Path) -> tuple[list[float], float]:
    """Gradient norms that Megatron-Core computes in one step, and the one that the step reports."""
    from megatron.core.optimizer import optimizer

    with world(Layout(), rank, init_method), pytest.MonkeyPatch.context() as patch:
        engine, computed = build(Layout(), model_dir, options=OPTIONS), list[float]()
        inner = optimizer.get_grad_norm_fp32

        def norm(*args: Any, **options: Any) -> float:
            computed.append(inner(*args, **options))
            return computed[-1]

        patch.setattr(optimizer, "get_grad_norm_fp32", norm)
        return computed, engine.train_step(make_rows(), sft_objective(), denominator=DENOMINATOR).grad_norm


def test_a_step_computes_one_norm(ranks: RankPool, tmp_path: Path) -> None:
    computed, reported = ranks.run(1, norms_of_a_step, make_model(tmp_path / "model", num_hidden_layers=1))[0]
    assert computed == [reported]


def bf16_steps(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, options: OptimizerOptions
) -> tuple[Parts, list[tuple[float, float]]]:
    """The first gradient; per step, how far AdamW on float32 copies moves weights, and how far off the engine is."""
    with world(layout, rank, init_method):
        engine, distances = build(layout, model_dir, options=options, temperature=TEMPERATURE), []
        copies = {name: p.detach().float().clone() for name, p in engine.named_parameters()}
        optimizer, first = adamw(copies, OPTIONS), None
        for step in range(STEPS):
            rows = make_rows(seed=step)
            engine.accumulate_gradients(engine.micro_batches(rows), sft_objective(), denominator=DENOMINATOR)
            first = first or parts(engine, gradients=True)
            for name, parameter in engine.named_parameters():
                copies[name].grad = parameter.main_grad.clone()
            norm = torch.nn.utils.clip_grad_norm_(copies.values(), OPTIONS.clip_grad)
            set_rate(optimizer, written_out_rate(step + 1, OPTIONS))
            before = {name: copy.clone() for name, copy in copies.items()}
            optimizer.step()
            result = engine.train_step(rows, sft_objective(), denominator=DENOMINATOR)
            assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
            moved = off = 0.0
            for name, parameter in engine.named_parameters():
                main = main_weight(engine.optimizer, parameter)
                assert torch.equal(parameter, main.bfloat16()), "the model computes with the rounded main weight"
                moved = max(moved, float((copies[name] - before[name]).abs().max()))
                off = max(off, float((copies[name] - main).abs().max()))
            distances.append((moved, off))
        assert first is not None
        return first, distances


@pytest.mark.parametrize("kept", ["main parameters", "distopt", "on the host"])
def test_bf16_steps_are_those_of_adamw_on_float32_copies(ranks: RankPool, tmp_path: Path, kept: str) -> None:
    model_dir = make_model(tmp_path / "model", family="qwen2", num_hidden_layers=2)
    layout = Layout(bf16=True, distributed_optimizer=kept != "main parameters")
    host = kept == "on the host"
    options = replace(OPTIONS, optimizer_cpu_offload=host, optimizer_offload_fraction=0.5 if host else 1.0)
    first, distances = ranks.run(1, bf16_steps, layout, model_dir, options)[0]
    for moved, off in distances:
        assert moved > 5e-4 and off < 1e-5
    model = transformers_model(model_dir)
    transformers_loss(model, 0).backward()  # type: ignore[no-untyped-call]
    for key, gradient in assemble([first]).items():
        expected = model.get_parameter(key).grad
        assert expected is not None
        # the key's bias moves every score of a query alike, so its gradient is rounding
        if not key.endswith("k_proj.bias"):
            along = torch.nn.functional.cosine_similarity(gradient.double().flatten(), expected.flatten(), dim=0)
            assert along > 0.98, key
            assert float(gradient.norm() / expected.norm()) == pytest.approx(1.0, abs=0.1), key
