"""Sources of rewards, such as code, models and servers, and the sum that samples are trained with."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

from megarlhf.data.types import Rollout, Sample

logger = logging.getLogger(__name__)

Outcome = tuple[float | None, str | None]  # a sample's reward, or why it has none


@dataclass(frozen=True, kw_only=True)
class SourceResult:
    """What a source says of some samples."""

    outcomes: list[Outcome]  # one a sample
    logs: Mapping[str, Sequence[float | None]] = field(default_factory=dict)  # further numbers, one a sample


class RewardSource(Protocol):
    """One of those whose scores are summed.

    Attributes:
        name: of its metrics, in lower case.
    """

    name: str

    def check(self) -> None:
        """Start what it needs, unless that is done already.

        Raises:
            ValueError: it cannot score, and why.
        """

    def score(self, rollout: Rollout) -> SourceResult:
        """A reward or the reason why there is none for each sample, whatever happens."""

    def close(self) -> None:
        """End what it has started; a score that another thread waits for ends soon."""


class SumOfSources:
    """The reward of a run: the weighted sum of its sources, asked side by side.

    A sample that one source has no result for has none; what the others said of it stays in its parts.
    """

    def __init__(self, sources: Sequence[RewardSource], weights: Sequence[float] | None = None) -> None:
        self.sources = list(sources)
        self.weights = [1.0] * len(self.sources) if weights is None else list(weights)
        assert len(self.weights) == len(self.sources), "one weight for each source"

    def check(self) -> None:
        """Check every source.

        Raises:
            ValueError: what is wrong with each of them, one a line.
        """
        errors = []
        for source in self.sources:
            try:
                source.check()
            except ValueError as error:
                errors.append(str(error))
        if errors:
            raise ValueError("\n".join(errors))

    def score(self, rollout: Rollout) -> list[Sample]:
        """The samples, in their order, with reward and parts."""
        results = self._results(rollout)
        for source, result in zip(self.sources, results, strict=True):
            _say_losses(source.name, result.outcomes)
        return [
            replace(sample, reward=self._sum(index, results), parts=self._parts(index, results))
            for index, sample in enumerate(rollout.samples)
        ]

    def _results(self, rollout: Rollout) -> list[SourceResult]:
        """Of all sources; an interruption of this thread ends them."""
        if len(self.sources) == 1:
            return [self.sources[0].score(rollout)]
        with ThreadPoolExecutor(len(self.sources)) as pool:
            try:
                return list(pool.map(lambda source: source.score(rollout), self.sources))
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End what the sources have started."""
        for source in self.sources:
            source.close()

    def _sum(self, index: int, results: Sequence[SourceResult]) -> float | None:
        total = 0.0
        for weight, result in zip(self.weights, results, strict=True):
            reward, _ = result.outcomes[index]
            if reward is None:
                return None
            total += weight * reward
        return total

    def _parts(self, index: int, results: Sequence[SourceResult]) -> dict[str, float | None]:
        parts: dict[str, float | None] = {}
        for source, result in zip(self.sources, results, strict=True):
            parts[source.name] = result.outcomes[index][0]
            parts |= {f"{source.name}/{name}": values[index] for name, values in result.logs.items()}
        return parts


def _say_losses(name: str, outcomes: Sequence[Outcome]) -> None:
    reasons = [reason for _, reason in outcomes if reason is not None]
    if reasons:
        listed = "; ".join(f"{count} x {reason}" for reason, count in Counter(reasons).most_common(3))
        logger.warning("%d of %d samples have no reward from %s: %s", len(reasons), len(outcomes), name, listed)
