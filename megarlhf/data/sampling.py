"""The order in which prompts, or units of rows, are drawn."""

from functools import lru_cache

import torch


@lru_cache(maxsize=2)  # the end of an epoch and the start of the next meet in a batch
def _order(num_rows: int, seed: int) -> torch.Tensor:
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))


def drawn_rows(num_rows: int, seed: int, start: int, stop: int) -> list[int]:
    """Places in a list of rows of the draws number `start` to `stop`, at least one, counted from 0 over all epochs.

    Epoch e is the permutation drawn from seed + e.
    """
    found: list[int] = []
    for epoch in range(start // num_rows, (stop - 1) // num_rows + 1):
        order, offset = _order(num_rows, seed + epoch), epoch * num_rows
        found += order[max(0, start - offset) : stop - offset].tolist()
    return found


class PromptSampler:
    """Endless, stateless order of rows: a batch depends on the seed and on how many rows were drawn before it.

    Epochs are those of `drawn_rows`; batches cut the endless line of epochs, so one batch may hold the
    end of an epoch and the start of the next, and a batch larger than the data holds rows more than once. Continuing
    a run needs its step and the rows consumed so far, and nothing else: the batch size may change.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        *,
        first_step: int = 0,
        consumed: int = 0,
        shuffles: bool = True,
    ) -> None:
        """Draw from the first `num_rows` rows after `first_step` steps, which drew `consumed` of them.

        Without `shuffles` rows come in their order, and their numbers count on from epoch to epoch.
        """
        assert num_rows >= 1 and batch_size >= 1, f"a batch of {batch_size} out of {num_rows} rows"
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.shuffles = shuffles
        self._offset = consumed - first_step * batch_size

    def batch(self, step: int) -> list[int]:
        """Places in the list of rows, `batch_size` of them, for a step counted from 0."""
        start, stop = self.consumed(step), self.consumed(step + 1)
        if not self.shuffles:
            return list(range(start, stop))
        return drawn_rows(self.num_rows, self.seed, start, stop)

    def consumed(self, step: int) -> int:
        """Rows drawn before a step."""
        return self._offset + step * self.batch_size

    def epoch(self, step: int) -> float:
        """Passes over the data made before a step."""
        return self.consumed(step) / self.num_rows
