"""Which step's evaluation was the best so far."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarlhf.config.arguments import LoggingArguments
from megarlhf.formats.run_checkpoints import BEST


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best evaluation of a run; it is saved with each checkpoint."""

    metric: str | None = None  # --best_metric
    step: int | None = None  # None: there is none yet
    value: float = 0.0

    def __str__(self) -> str:
        return f"{self.metric}={self.value:.4g} after step {self.step}"

    def after(self, step: int, metrics: Mapping[str, float], logging: LoggingArguments) -> "Best":
        """This or, where it is better, what `step` measured; NaN and a metric that is not there are not better."""
        name = logging.best_metric
        value = None if name is None else metrics.get(name)
        if value is None or value != value:
            return self
        is_first = self.step is None or self.metric != name  # of another metric where a run goes on with this one
        is_better = value > self.value if logging.best_metric_mode == "max" else value < self.value
        return Best(metric=name, step=step, value=value) if is_first or is_better else self

    def directory(self, logging: LoggingArguments) -> Path | None:
        """The checkpoint of that step, where it is in this run's directory and of the metric that is asked for."""
        place = Path(logging.save) / "checkpoints" / BEST
        return place if self.metric is not None and self.metric == logging.best_metric and place.exists() else None

    @staticmethod
    def of_state(state: Mapping[str, Any]) -> "Best":
        """What a checkpoint's state has of it; checkpoints from before there was a best one have nothing."""
        return Best(**state.get("best", {}))
