"""What the engine is told to optimise: a loss over per-token outputs, given as a parameter."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megarlhf.data.types import MicroBatch, TargetValues
from megarlhf.parallel.vocab import EntropyUse


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is NaN or infinite; weights, optimizer and schedule are as they were before the step."""


@dataclass(frozen=True, kw_only=True)
class TokenOutputs:
    """What the last pipeline stage computes for each packed position; None where the head has no such output.

    Log-probs and entropy are 0 where there is no target.
    """

    log_probs: Tensor | None = None  # [t] float32, log p(target)
    entropy: Tensor | None = None  # [t] float32, nats; None where the objective has no use for it
    values: Tensor | None = None  # [t] float32


Metrics = dict[str, tuple[Tensor, Tensor | int]]  # name -> sum over the micro-batch, and how many numbers it is of
Loss = Callable[[TokenOutputs, MicroBatch], tuple[Tensor, Metrics]]
Forward = Callable[[list[MicroBatch]], TargetValues]  # log-probs or values of this rank's targets, on the last stage


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss and the metrics it reports.

    `loss` returns a sum over the micro-batch, and a sum and a count for each of `metric_names`. The engine divides the
    loss by the global denominator, and each metric's sum over all micro-batches by its count over all of them, so the
    gradient and the metrics are the same for every split into ranks and micro-batches.

    `prepare` runs before the first forward pass with gradients, with a function that runs the model without: it gives
    the packed sequences back with the fields that the loss asks for, such as what other weights make of the same
    tokens.
    """

    loss: Loss
    metric_names: tuple[str, ...]
    prepare: Callable[[Forward, list[MicroBatch]], list[MicroBatch]] | None = None
    entropy: EntropyUse = "unused"  # what `loss` does with the entropy of the policy
