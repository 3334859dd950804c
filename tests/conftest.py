"""Fixtures that several folders share."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megarlhf.cluster  # noqa: F401  (it has Ray ask for tokens, which Ray reads as soon as some test imports it)
from tests.distributed.pool import RankPool
from tests.shares import pytest_addoption, pytest_collection_modifyitems

__all__ = ["pytest_addoption", "pytest_collection_modifyitems"]


def pytest_configure(config: pytest.Config) -> None:
    """A busy machine fails no property for the time that one example takes; tests/gpu runs without Hypothesis."""
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import settings

        settings.register_profile("no deadline", deadline=None)
        settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Gloo ranks; each starts once, because importing Megatron-Core takes seconds."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's untrained model, as input of whole runs."""
    directory = tmp_path_factory.mktemp("assets")
    script = Path(__file__).parents[1] / "examples" / "demo" / "make_assets.py"
    subprocess.run([sys.executable, str(script), str(directory), "--seed", "3"], check=True)
    return directory
