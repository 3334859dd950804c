"""The cluster, which the tests of a file share."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Iterator[Cluster]:
    """Two nodes, which see the demo's model and data."""
    if shutil.which("slurmctld") is None:
        pytest.skip("needs root and Slurm: requirements/system.sh installs it")
    directory = tmp_path_factory.mktemp("slurm")
    for path in (directory, *directory.parents):
        if path.owner() == "root" and path.is_relative_to("/tmp/pytest-of-root"):
            path.chmod(0o755)  # munged asks for it
    cluster = Cluster(directory, assets)
    yield cluster
    cluster.stop()
