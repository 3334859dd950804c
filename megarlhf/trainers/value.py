"""The critic's objective: clipped squared error to the returns."""

from torch import Tensor

from megarlhf.algos.losses import value_loss
from megarlhf.data.types import MicroBatch
from megarlhf.engine.objective import Metrics, Objective, TokenOutputs


def value_objective(*, value_clip: float) -> Objective:
    """0.5 * max((V - R)^2, (clip(V, V_old +- value_clip) - R)^2) per token, weighted and summed.

    Fields of the micro-batch: `old_values`, `returns`, `weights`.
    """

    def loss(outputs: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        mask, fields = batch.target_mask, batch.fields
        assert outputs.values is not None
        values, weights = outputs.values[mask], fields["weights"][mask]
        per_token, clipped = value_loss(
            values, fields["old_values"][mask], fields["returns"][mask], value_clip=value_clip
        )
        metrics = {"clip_frac": clipped.float(), "value_mean": values.detach()}
        return (per_token * weights).sum(), {name: (value.sum(), len(value)) for name, value in metrics.items()}

    return Objective(loss=loss, metric_names=("clip_frac", "value_mean"))
