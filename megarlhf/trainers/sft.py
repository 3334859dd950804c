"""Supervised fine-tuning: cross-entropy of the target tokens."""

from torch import Tensor

from megarlhf.data.types import MicroBatch
from megarlhf.engine.objective import Metrics, Objective, TokenOutputs
from megarlhf.trainers.supervised import SupervisedTask


def sft_task() -> SupervisedTask:
    """Its objective, over the targets of any rows."""
    return SupervisedTask(name="sft", objective=sft_objective())


def sft_objective() -> Objective:
    """-log p of each target, summed; the engine divides by the number of targets in the global batch."""

    def loss(outputs: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        assert outputs.log_probs is not None
        return -outputs.log_probs[batch.target_mask].sum(), {}

    return Objective(loss=loss, metric_names=())
