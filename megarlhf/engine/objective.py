"""What the engine is told to optimise: a loss over per-token outputs, given as a parameter."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megarlhf.data.types import MicroBatch, TargetValues
from megarlhf.parallel.vocab import EntropyUse, OutputDistribution


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is NaN or infinite; weights, optimizer and schedule are as they were before the step."""


@dataclass(frozen=True, kw_only=True)
class TokenOutputs:
    """What the last pipeline stage computes for each packed position; None where it is not asked for.

    Numbers are 0 where the loss looks at no target, but for values.
    """

    log_probs: Tensor | None = None  # [t] float32, log p(target)
    entropy: Tensor | None = None  # [t] float32, nats
    values: Tensor | None = None  # [t] float32
    hidden: Tensor | None = None  # [t, h] what the output layer takes
    candidates: Tensor | None = None  # [t, k] float32, log p of tokens that the objective names
    likeliest: Tensor | None = None  # [t] int64, the token of the largest log p
    divergence: Tensor | None = None  # [t] float32, nats, from another model's distribution
    teacher_entropy: Tensor | None = None  # [t] float32, nats, of that other distribution


@dataclass(frozen=True, kw_only=True)
class OutputLayer:
    """A language model's last step, for outputs that an objective computes by itself.

    Attributes:
        hidden: [n, h] in the weights' dtype, of the positions whose target the loss looks at.
        weight: [padded_vocab / tp, h] this rank's rows.
        places: [n] positions of `hidden` in the packed sequence.
        group: tensor-parallel group.
    """

    hidden: Tensor
    weight: Tensor
    places: Tensor
    distribution: OutputDistribution
    group: dist.ProcessGroup

    def on_sequence(self, values: Tensor, length: int) -> Tensor:
        """[t] or [t, k]: values of the n positions, 0 elsewhere."""
        return values.new_zeros(length, *values.shape[1:]).index_copy(0, self.places, values)


Metrics = dict[str, tuple[Tensor, Tensor | int]]  # name -> sum over the micro-batch, and how many numbers it is of
Loss = Callable[[TokenOutputs, MicroBatch], tuple[Tensor, Metrics]]
Outputs = Callable[[OutputLayer, MicroBatch], TokenOutputs]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss and the metrics it reports.

    `loss` returns a sum over the micro-batch, and a sum and a count for each of `metric_names`. The engine divides the
    loss by the global denominator, and each metric's sum over all micro-batches by its count over all of them, so the
    gradient and the metrics are the same for every split into ranks and micro-batches.
    """

    loss: Loss
    metric_names: tuple[str, ...]
    entropy: EntropyUse = "unused"  # what `loss` does with the entropy of the policy
    outputs: Outputs | None = None  # what a language model's last stage computes; None: log-probs and entropy


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One term of an optimizer step's loss: coef * sum(objective over all ranks' packed sequences) / denominator.

    Attributes:
        name: of the metric `<name>_loss` that a further term reports, before its coefficient.
        batches: this rank's packed sequences; as many on every rank.
    """

    name: str
    batches: list[MicroBatch]
    objective: Objective
    denominator: float
    coef: float = 1.0


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step reports; the same on every rank, but for `outputs`."""

    loss: float
    metrics: dict[str, float]
    grad_norm: float
    learning_rate: float
    outputs: TargetValues  # log-probs or values of the training forward, of this rank's rows, on the last stage
