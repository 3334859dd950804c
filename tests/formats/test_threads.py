"""map_threads: order, thread counts, and what happens after a failure."""

import time

import pytest
import torch

from megarlhf.formats.threads import map_threads


@pytest.mark.parametrize("threads", [1, 3])
def test_run_threads_keeps_order_and_thread_counts(threads: int) -> None:
    before = torch.get_num_threads()
    seen = map_threads(lambda i: (i, torch.get_num_threads()), range(20), threads)
    assert seen == [(i, before if threads == 1 else 1) for i in range(20)]
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        map_threads(lambda i: 1 // i, range(2), threads)


def test_run_threads_starts_nothing_after_a_failure() -> None:
    started = []

    def fail_first(index: int) -> None:
        started.append(index)
        if index == 0:
            raise RuntimeError("first")
        time.sleep(0.05)

    with pytest.raises(RuntimeError, match="first"):
        map_threads(fail_first, range(40), 2)
    assert len(started) < 5
