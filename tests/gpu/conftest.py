"""Ranks that compute on the CPU, also beside a GPU."""

import os
from collections.abc import Iterator

import pytest

from megarlhf.parallel.device import DeviceKind, device_kind
from tests.distributed.pool import RankPool

if device_kind() == "gpu":
    # Ranks start with it: matrix products in one order, as torch.use_deterministic_algorithms asks for.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def kind_here(rank: int, world_size: int, init_method: str) -> DeviceKind:
    """What a rank computes on."""
    return device_kind()


@pytest.fixture(scope="session")
def cpu_ranks(ranks: RankPool) -> Iterator[RankPool]:
    """Gloo ranks: a process decides once what it computes on, by whether it sees a GPU."""
    if device_kind() == "cpu":
        yield ranks
        return
    pool = RankPool()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert pool.run(1, kind_here) == ["cpu"]
    yield pool
    pool.close()
