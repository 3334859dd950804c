"""What Transformers' own model computes on the CPU: log-probs, loss, gradients, one step of PyTorch's AdamW."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megarlhf.data.types import TrainingRows
from megarlhf.engine.optimizer import OptimizerOptions
from tests.distributed.cases import sequences

Named = dict[str, Tensor]  # by their names in a checkpoint


@dataclass(frozen=True, kw_only=True)
class Results:
    """Of the supervised loss, mean over all targets, and one optimizer step on it; all on the CPU."""

    log_probs: Tensor  # [targets], of all rows in order
    loss: float
    gradients: Named
    grad_norm: float  # before clipping
    movement: Named  # of the float32 weights in the step
    after: Tensor  # [targets] log-probs after the step


def transformers_results(
    model_dir: Path,
    rows: TrainingRows,
    options: OptimizerOptions,
    scratch: Path,
    *,
    temperature: float,
    weights: torch.dtype,
    computing: torch.dtype,
) -> Results:
    """Row by row, in eager attention.

    Args:
        weights: what the checkpoint's weights are rounded to before anything else, and again after the step.
        computing: what is computed in; gradients are added up in float32 in any case.
    """
    main = [p.detach().to(weights).float() for p in _model(model_dir).parameters()]
    total = int(rows.num_targets.sum())

    model = _model(model_dir, main, weights).to(computing)
    sums = [torch.zeros_like(weight) for weight in main]
    log_probs = []
    for chosen in _chosen(model, rows, temperature):
        (-chosen.sum() / total).backward()
        log_probs.append(chosen.detach())
        for whole, parameter in zip(sums, model.parameters(), strict=True):
            if parameter.grad is not None:  # None: an expert that this row did not choose
                whole += parameter.grad.float()
                parameter.grad = None
    found = torch.cat(log_probs)
    norm = float(torch.stack([gradient.double().square().sum() for gradient in sums]).sum().sqrt())

    stepped = [weight.clone().requires_grad_() for weight in main]
    clip = min(1.0, options.clip_grad / (norm + 1e-6))
    for weight, gradient in zip(stepped, sums, strict=True):
        weight.grad = gradient * clip
    betas = (options.adam_beta1, options.adam_beta2)
    torch.optim.AdamW(
        stepped, lr=options.learning_rate, betas=betas, eps=options.adam_eps, weight_decay=options.weight_decay
    ).step()
    moved = [weight.detach() - old for weight, old in zip(stepped, main, strict=True)]
    with torch.no_grad():
        model = _model(model_dir, [weight.detach() for weight in stepped], weights).to(computing)
        after = torch.cat(list(_chosen(model, rows, temperature)))
    return Results(
        log_probs=found,
        loss=float(-found.double().mean()),
        gradients=_as_checkpoint(model_dir, sums, scratch / "gradients"),
        grad_norm=norm,
        movement=_as_checkpoint(model_dir, moved, scratch / "movement"),
        after=after,
    )


def _model(
    model_dir: Path, weights: Sequence[Tensor] | None = None, rounded: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The checkpoint's model in float32, with other weights where they are given, rounded."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    if weights is not None:
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.data = weight.to(rounded).float()
    return model


def _chosen(model: PreTrainedModel, rows: TrainingRows, temperature: float) -> Iterator[Tensor]:
    """Each row's log-probs of its targets, float32."""
    for tokens, prompt_length in sequences(rows):
        ids = torch.tensor([tokens])
        logits = model(ids[:, :-1]).logits[0, prompt_length - 1 :].float() / temperature
        yield logits.log_softmax(-1).gather(-1, ids[0, prompt_length:, None])[:, 0]


def _as_checkpoint(model_dir: Path, numbers: Sequence[Tensor], target: Path) -> Named:
    """Numbers of each parameter under the names of a checkpoint, where experts lie one by one: saved as weights."""
    _model(model_dir, numbers).save_pretrained(target)
    found = load_file(target / "model.safetensors")
    return {name: tensor for name, tensor in found.items() if not name.endswith("e_score_correction_bias")}
