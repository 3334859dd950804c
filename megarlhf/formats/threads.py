"""Many operations of a millisecond in threads next to each other."""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import set_num_threads  # the function itself: vLLM's CPU worker replaces torch's by a no-op

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> list[Result]:
    """The results of `function` in order, computed in threads whose own PyTorch operations use one core each.

    Many operations of a millisecond run faster next to each other than one after the other on all cores: no barrier
    within each, which costs a time slice wherever a core is busy with something else.
    """
    if threads == 1:
        return [function(item) for item in items]
    default = torch.get_num_threads()

    def use_one_core() -> None:
        torch.get_num_threads()  # PyTorch sets a new thread's count at its first use, which must not come later
        set_num_threads(1)

    try:
        with ThreadPoolExecutor(threads, initializer=use_one_core) as pool:
            futures = [pool.submit(function, item) for item in items]
            for future in wait(futures, return_when=FIRST_EXCEPTION).not_done:
                future.cancel()
            return [future.result() for future in futures]  # a failure comes before what was cancelled for it
    finally:
        set_num_threads(default)  # for threads that start later
