"""The demo's untrained model as input of whole runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("assets")
    script = ROOT / "examples" / "demo" / "make_assets.py"
    subprocess.run([sys.executable, str(script), str(directory), "--seed", "3"], check=True)
    return directory
