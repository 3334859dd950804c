"""What the tests of engines share."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """An engine sets variables of its process, which other tests are not to see."""
    saved = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(saved)
