"""A reward model's processes: one number for each response, read at its last token."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np

from megarlhf.cluster.group import WorkerGroup
from megarlhf.cluster.roles import TrainingGroup
from megarlhf.data.partition import DataParallelSplit
from megarlhf.data.planning import PackingOptions
from megarlhf.data.types import Floats, Rollout


class RewardGroup(TrainingGroup):
    """A reward model as reward/model.py asks.

    Args:
        places: as for TrainingGroup.
        turn: held while the model computes, so that those on the same devices do so one after another.
    """

    def __init__(
        self,
        workers: WorkerGroup,
        places: Sequence[tuple[int, PackingOptions]],
        *,
        turn: AbstractContextManager[object],
    ) -> None:
        super().__init__(workers, places)
        self._turn, self._is_asked = turn, False

    def scores(self, rollout: Rollout, *, eos: int | None) -> Floats:
        """See ScoringModel. The driver plans as if EOS came behind every stopped response."""
        samples = rollout.samples
        ended = [sample.finish_reason == "stop" and eos is not None for sample in samples]
        longest = [
            replace(sample, response_length=sample.response_length + 1 + end)
            for sample, end in zip(samples, ended, strict=True)
        ]
        packing = replace(self._packing, max_tokens=self._packing.max_tokens + 1)
        split = DataParallelSplit(longest, [range(len(samples))], num_ranks=self._num_replicas, packing=packing)
        stopped: dict[int, list[int]] = {}
        for sample, end in zip(samples, ended, strict=True):
            stopped.setdefault(sample.group_id, []).extend([sample.sample_id] if end else [])
        arguments = [
            (own, [(rollout.tokens[group], stopped[group]) for group in own.groups.tolist()], eos)
            for own in split.partitions
        ]
        self._is_asked = True
        try:
            with self._turn:
                found = self._by_replica(self._call("scores", [(stored,) for stored in self.workers.put(arguments)]))
        finally:
            self._is_asked = False
        whole = np.empty(len(samples), dtype=np.float32)
        for rows, scores in zip(split.rows, found, strict=True):
            whole[rows] = scores
        return whole

    def stop(self) -> None:
        """See ScoringModel. Other models that wait for their turn are stopped by themselves."""
        if self._is_asked:
            self.workers.kill()
