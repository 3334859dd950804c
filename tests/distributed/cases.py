"""What each rank computes for the parity tests: per-token results, loss, gradients, the weights after one step."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlhf.data.types import TrainingRow
from megarlhf.engine.engine import MegatronEngine
from megarlhf.engine.objective import Objective
from megarlhf.engine.schedule import sum_gradients
from megarlhf.trainers.policy import PolicyLossOptions, policy_objective
from megarlhf.trainers.sft import sft_objective
from megarlhf.trainers.value import value_objective
from tests.distributed.layouts import Layout, build, world

Parts = list[tuple[str, tuple[slice, ...], Tensor]]  # HF name, this rank's part of it, the numbers
OBJECTIVES = ("sft", "actor", "critic")


@dataclass
class Result:
    """What one rank saw."""

    forward: dict[int, Tensor] = field(default_factory=dict)  # row -> log-probs or values
    outputs: dict[int, Tensor] = field(default_factory=dict)  # the same from the training forward
    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    gradients: Parts = field(default_factory=list)
    weights: Parts = field(default_factory=list)  # after one optimizer step
    after: dict[int, Tensor] = field(default_factory=dict)  # log-probs or values after it


def make_rows(*, groups: int = 3, samples: int = 3, vocab_size: int = 100, seed: int = 5) -> list[TrainingRow]:
    """Groups of samples with equal prompts, ragged responses and every field that a loss may ask for."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    rows = []
    for group in range(groups):
        prompt = draw(3, vocab_size, 3 + 2 * group)
        for length in draw(2, 12, samples):
            names = ("advantages", "old_log_probs", "ref_log_probs", "old_values", "returns")
            fields = {name: torch.randn(length, generator=generator) for name in names}
            fields["old_log_probs"] = fields["old_log_probs"] - 4.6
            fields["ref_log_probs"] = fields["ref_log_probs"] - 4.6
            fields["weights"] = torch.full((length,), 1.0 / length)
            ids = (*prompt, *draw(3, vocab_size, length))
            rows.append(TrainingRow(input_ids=ids, prompt_length=len(prompt), group_id=group, fields=fields))
    return rows


def make_objective(name: str) -> Objective:
    """One of OBJECTIVES, every term switched on."""
    if name == "sft":
        return sft_objective()
    if name == "critic":
        return value_objective(value_clip=0.2)
    return policy_objective(
        PolicyLossOptions(
            clip_eps_low=0.2,
            clip_eps_high=0.3,
            dual_clip=3.0,
            entropy_coef=0.01,
            kl_loss_coef=0.05,
            kl_estimator="k3",
        )
    )


def parity_case(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, objective: str, temperature: float
) -> Result:
    """Forward, gradients, then one optimizer step."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir, head="value" if objective == "critic" else "lm", temperature=temperature)
        rows, result = make_rows(), Result()
        forward = engine.values if objective == "critic" else engine.log_probs
        result.forward = forward(rows)
        reduce_whole(engine)
        denominator = float(sum(row.num_targets for row in rows) if objective == "sft" else len(rows))
        result.loss, result.metrics, result.outputs = engine.accumulate_gradients(
            rows, make_objective(objective), denominator=denominator
        )
        result.gradients = parts(engine, gradients=True)
        engine.config.finalize_model_grads_func = sum_gradients
        step = engine.train_step(rows, make_objective(objective), denominator=denominator)
        result.grad_norm = step.grad_norm
        result.after = forward(rows)
        result.weights = parts(engine, gradients=False)
        return result


def reduce_whole(engine: MegatronEngine) -> None:
    """Leave whole gradients on every rank, where the distributed optimizer would leave each its shard."""

    def finalize(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        sum_gradients(model, num_tokens, **(kwargs | {"force_all_reduce": True}))

    engine.config.finalize_model_grads_func = finalize


def parts(engine: MegatronEngine, *, gradients: bool) -> Parts:
    """This rank's gradients or weights under their HF names."""
    found: Parts = []
    for bound in engine.weights.bound:
        if bound.exported and not (gradients and bound.weight.buffer):
            data = bound.param.main_grad if gradients else bound.param.data
            for shard in engine.weights._shards(bound, data):
                part = shard.view.float()
                whole = engine.weights.hf_shapes()[shard.hf_name]
                shape = tuple(len(range(n)[s]) for n, s in zip(whole, shard.index, strict=True))
                found.append((shard.hf_name, shard.index, part.reshape(shape).clone()))
    return found


def assemble(results: list[Parts]) -> dict[str, Tensor]:
    """Whole tensors from every rank's parts; NaN where no rank has a number."""
    whole: dict[str, Tensor] = {}
    stops: dict[str, list[int]] = {}
    for name, index, part in (entry for rank in results for entry in rank):
        present = [s.stop if s.stop is not None else n for s, n in zip(index, part.shape, strict=True)]
        stops[name] = [max(a, b) for a, b in zip(present, stops.get(name, present), strict=True)]
    for name, index, part in (entry for rank in results for entry in rank):
        whole.setdefault(name, torch.full(stops[name], torch.nan))[index] = part
    return whole
