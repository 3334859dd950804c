"""Forward and backward over this rank's micro-batches through Megatron-Core's pipeline schedules.

The only place where gradients are scaled: not at all. Losses arrive as sums over a global denominator, data-parallel
reduction adds, and Megatron-Core's own divisions (by micro-batches, by tokens) are switched off.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megarlhf.data.packing import lengthened
from megarlhf.data.types import KEPT_TOKENS, MicroBatch
from megarlhf.engine.objective import LossTerm, Objective, OutputLayer, Outputs, TokenOutputs
from megarlhf.models.heads import output_weight
from megarlhf.parallel.device import current_device, finish_computing
from megarlhf.parallel.groups import Ranks
from megarlhf.parallel.megatron_versions import ranks_in_balance_loss
from megarlhf.parallel.packed_params import packed_params
from megarlhf.parallel.vocab import (
    EntropyUse,
    OutputDistribution,
    vocab_parallel_kept_tokens,
    vocab_parallel_log_probs,
)

OutputFn = Callable[[Tensor, MicroBatch, Outputs], TokenOutputs]
Finish = Callable[[Tensor, MicroBatch], Any]  # makes a result of the last stage's output for a micro-batch


def sum_gradients(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron-Core's gradient reduction without its division by tokens: the loss carries its denominator."""
    finalize_model_grads(model, None, **kwargs)


class GradientReduction:
    """`sum_gradients`, in which a rank waits for the others that have gradients of the same parameters.

    Attributes:
        reached: time.perf_counter() of when this rank was done with its own last, on its device too.
    """

    reached = 0.0

    def __call__(self, model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """As sum_gradients."""
        finish_computing()
        self.reached = time.perf_counter()
        sum_gradients(model, num_tokens, **kwargs)


def token_outputs(
    output: Tensor,
    batch: MicroBatch,
    compute: Outputs,
    *,
    model: Any,
    head: str,
    distribution: OutputDistribution,
) -> TokenOutputs:
    """Last stage's output, [1, t, h] hidden states or [1, t, 1] values, as per-token numbers.

    Args:
        compute: a language model's outputs, from its last layer's.
        model: the last chunk of layers, as GPTModel; hidden states are of its LMHead.
    """
    if head == "value":
        return TokenOutputs(values=output.float().reshape(-1))
    weight, (places,) = output_weight(model), batch.target_mask.nonzero(as_tuple=True)
    layer = OutputLayer(
        hidden=output[0].index_select(0, places).to(weight.dtype),
        weight=weight,
        places=places,
        distribution=distribution,
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    return compute(layer, batch)


def target_log_probs(layer: OutputLayer, batch: MicroBatch, *, entropy: EntropyUse = "unused") -> TokenOutputs:
    """Log-probs of the targets, and the entropy of their distributions where it is used.

    Of rows with the field `kept_tokens` distributions are over these tokens, whatever weights compute.
    """
    kept = batch.fields.get(KEPT_TOKENS)
    log_probs, entropies = vocab_parallel_log_probs(
        layer.hidden,
        layer.weight,
        batch.targets[layer.places],
        of=layer.distribution,
        entropy=entropy,
        kept=None if kept is None else kept[layer.places].long(),
        group=layer.group,
    )
    length = len(batch.targets)
    return TokenOutputs(
        log_probs=layer.on_sequence(log_probs, length),
        entropy=None if entropies is None else layer.on_sequence(entropies, length),
    )


def kept_tokens(layer: OutputLayer, batch: MicroBatch) -> TokenOutputs:
    """The targets' log-probs, and behind each what the field `kept_tokens` is to hold: this rank's part of the tokens
    that the truncation keeps."""
    kept = vocab_parallel_kept_tokens(layer.hidden, layer.weight, of=layer.distribution, group=layer.group)
    log_probs = target_log_probs(layer, batch).log_probs
    assert log_probs is not None
    found = layer.on_sequence(kept.float(), len(batch.targets))  # float32 holds columns up to 2^24
    return TokenOutputs(candidates=torch.cat([log_probs[:, None], found], -1))


def hidden_outputs(layer: OutputLayer, batch: MicroBatch) -> TokenOutputs:
    """What the output layer takes, and nothing of what it makes."""
    return TokenOutputs(hidden=layer.on_sequence(layer.hidden, len(batch.targets)))


def run_forward(
    chunks: list[Any], batches: list[MicroBatch], outputs: OutputFn, compute: Outputs = target_log_probs
) -> list[Any]:
    """Forward only; the last stage returns the TokenOutputs of each micro-batch, other stages an empty list."""
    with torch.no_grad():
        finishes: list[Finish] = [lambda output, batch: outputs(output, batch, compute)] * len(batches)
        return _run(chunks, batches, finishes, forward_only=True)


def run_evaluation(
    chunks: list[Any], batches: list[MicroBatch], outputs: OutputFn, objective: Objective
) -> list[Tensor]:
    """The objective's sums without gradients: on the last stage [loss, *metrics, *counts] of each micro-batch."""

    compute = objective_outputs(objective)

    def sums(output: Tensor, batch: MicroBatch) -> Tensor:
        return objective_sums(objective, outputs(output, batch, compute), batch)[1]

    with torch.no_grad():
        return _run(chunks, batches, [sums] * len(batches), forward_only=True)


def objective_outputs(objective: Objective) -> Outputs:
    """What the objective's loss looks at."""
    return objective.outputs or partial(target_log_probs, entropy=objective.entropy)


def objective_sums(objective: Objective, computed: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """The loss, and [loss, *sums of metrics, *counts of metrics] float64 without a gradient."""
    total, metrics = objective.loss(computed, batch)
    pairs = [metrics[name] for name in objective.metric_names]
    reported = [total, *(value for value, _ in pairs), *(count for _, count in pairs)]
    return total, torch.stack([torch.as_tensor(v, device=total.device).detach().double() for v in reported])


def run_forward_backward(
    chunks: list[Any], terms: list[LossTerm], outputs: OutputFn, *, unit: float
) -> list[list[Any]]:
    """Add the gradient of all terms together to the model's buffers, `unit` times as large, and reduce it once.

    The micro-batches of all terms pass through one pipeline.

    Returns:
        For each term, on the last stage, per micro-batch (TokenOutputs, [loss, *sums of metrics, *counts of metrics]);
        elsewhere an empty list.
    """

    def finish_of(term: LossTerm) -> Finish:
        compute, divisor = objective_outputs(term.objective), term.denominator / unit

        def loss(output: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, Any]:
            computed = outputs(output, batch, compute)
            total, sums = objective_sums(term.objective, computed, batch)
            return term.coef * total / divisor, torch.zeros((), dtype=torch.int, device=total.device), (computed, sums)

        return loss

    finishes = [finish_of(term) for term in terms for _ in term.batches]
    stored = iter(_run(chunks, [batch for term in terms for batch in term.batches], finishes, forward_only=False))
    return [list(islice(stored, len(term.batches))) for term in terms]


def equally_long(terms: Sequence[LossTerm]) -> list[LossTerm]:
    """The terms with all packed sequences padded to the longest."""
    longest = max(len(batch.tokens) for term in terms for batch in term.batches)
    return [replace(term, batches=[lengthened(batch, longest) for batch in term.batches]) for term in terms]


def summed(
    stored: list[Tensor], objective: Objective, *, counts: bool
) -> tuple[float, dict[str, tuple[float, float]]]:
    """Loss and metrics of all ranks, from the sums of this rank's micro-batches; every rank calls it.

    Args:
        counts: whether this rank's sums count.
    """
    names = objective.metric_names
    sums = torch.zeros(1 + 2 * len(names), dtype=torch.float64, device=current_device())
    for micro_sums in stored if counts else ():
        sums += micro_sums
    dist.all_reduce(sums)
    total, *values = sums.tolist()
    return total, dict(zip(names, zip(values[: len(names)], values[len(names) :], strict=True), strict=True))


def term_losses(
    terms: Sequence[LossTerm], stored: list[list[Any]], *, counts: bool
) -> tuple[list[float], dict[str, float]]:
    """Each term's loss before its coefficient, and the means of the first one's metrics with the others' losses.

    Args:
        stored: as `run_forward_backward` gives it.
    """
    losses, reported = list[float](), dict[str, float]()
    for number, (term, results) in enumerate(zip(terms, stored, strict=True)):
        total, pairs = summed([sums for _, sums in results], term.objective, counts=counts)
        losses.append(total / term.denominator)
        means = {name: value / count for name, (value, count) in pairs.items() if count}
        reported |= {f"{term.name}_loss": losses[-1]} if number else means
    return losses, reported


def balance_loss_unit(config: Any, ranks: Ranks, batches: list[MicroBatch]) -> float | None:
    """Divisor that makes Megatron-Core's load-balancing loss a mean over the batch's tokens; None: no such loss.

    Megatron-Core adds, on every rank, each micro-batch's loss times its tokens, and counts on a later division of the
    whole gradient by tokens. Here only `grad_scale_func` divides, and the objective's loss is multiplied beforehand by
    as much.
    """
    if not config.num_moe_experts or not config.moe_aux_loss_coeff:
        return None
    tokens = torch.tensor(float(sum(len(batch.tokens) for batch in batches)), device=current_device())
    dist.all_reduce(tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return float(tokens) / ranks_in_balance_loss(ranks.tp_size, ranks.cp_size)


def _run(
    chunks: list[Any], batches: list[MicroBatch], finishes: Sequence[Finish], *, forward_only: bool
) -> list[Any]:
    """Megatron-Core's schedule for one chunk of layers per rank, or the interleaved one for several.

    Args:
        finishes: what each micro-batch's last stage makes of its output.
    """
    impl = get_model_config(chunks[0]).transformer_impl
    work = list(zip(batches, finishes, strict=True))

    def forward_step(iterator: Iterator[tuple[MicroBatch, Finish]], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        packed, finish = next(iterator)
        batch = to_device(packed, current_device())
        params = packed_params(batch, transformer_impl=impl)
        output = chunk(batch.tokens[None], batch.position_ids[None], None, packed_seq_params=params)
        if forward_only:
            return output, lambda result, non_loss_data: finish(result, batch)
        return output, lambda result: finish(result, batch)

    longest = max(int(batch.cu_seqlens[-1]) for batch in batches)
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(work) if len(chunks) == 1 else [iter(work) for _ in chunks],
        model=chunks[0] if len(chunks) == 1 else chunks,
        num_microbatches=len(batches),
        seq_length=longest,
        micro_batch_size=1,
        decoder_seq_length=longest,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The same micro-batch with its tensors on `device`."""
    tensors: dict[str, Any] = {key: value.to(device) for key, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **tensors, fields={name: value.to(device) for name, value in batch.fields.items()})
