"""What several files of this folder share."""

from collections.abc import Iterator

import pytest

from megarlhf.cluster.local_processes import local_processes
from megarlhf.cluster.processes import Processes


@pytest.fixture
def processes() -> Iterator[Processes]:
    """Of children of the test."""
    with local_processes() as found:
        yield found
