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


Metrics = dict[str, tuple[Tensor, Tensor | int]]  # name -> sum over the micro-batch, and how many numbers it is of
Loss = Callable[[TokenOutputs, MicroBatch], tuple[Tensor, Metrics]]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss and the metrics it reports.

    `loss` returns a sum over the micro-batch, and a sum and a count for each of `metric_names`. The engine divides the
    loss by the global denominator, and each metric's sum over all micro-batches by its count over all of them, so the
    gradient and the metrics are the same for every split into ranks and micro-batches.
    """

    loss: Loss
    metric_names: tuple[str, ...]
