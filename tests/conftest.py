"""Fixtures that several folders share."""

from collections.abc import Iterator

import pytest

from tests.distributed.pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four gloo ranks; they start once, because importing Megatron-Core takes seconds."""
    pool = RankPool(4)
    yield pool
    pool.close()
