"""What the engine is told to optimise: a loss over per-token outputs, given as a parameter."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megarlhf.data.types import MicroBatch


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is NaN or infinite; weights, optimizer and schedule are as they were before the step."""


@dataclass(frozen=True, kw_only=True)
class TokenOutputs:
    """What the last pipeline stage computes for each packed position; None where the head has no such output."""

    log_probs: Tensor | None = None  # [t] float32, log p(target)
    entropy: Tensor | None = None  # [t] float32, nats
    values: Tensor | None = None  # [t] float32


Loss = Callable[[TokenOutputs, MicroBatch], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss and the metrics it reports.

    `loss` returns a sum over the micro-batch's targets and a sum for each of `metric_names`. The engine divides the
    loss by the global denominator and metrics by the number of targets, so the gradient and the metrics are the same
    for every split into ranks and micro-batches.
    """

    loss: Loss
    metric_names: tuple[str, ...]
