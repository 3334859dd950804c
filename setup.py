"""Installs the package; tools are configured in pyproject.toml.

The packages that it needs depend on the machine, so they are extras: `pip install .[cpu]` or `.[cuda]`. For a complete
and locked environment use `make setup`, which also leaves out what does not load beside the CPU torch.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """Requirement lines of a file in requirements/, without comments."""
    lines = [line.partition("#")[0].strip() for line in (HERE / "requirements" / name).read_text().splitlines()]
    return [line for line in lines if line]


def version() -> str:
    """__version__ of the package, read without importing it: its dependencies may not be there yet."""
    found = re.search(r'^__version__ = "(.+)"$', (HERE / "megarlhf" / "__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError('megarlhf/__init__.py has no line __version__ = "..."')
    return found[1]


setup(
    name="megarlhf",
    version=version(),
    description="RLHF and the classic alignment suite on Megatron-Core, vLLM and Ray",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megarlhf", "megarlhf.*"]),
    extras_require={
        "cpu": requirements("cpu.in"),
        "cuda": requirements("cuda.txt"),
        "dev": requirements("cpu-dev.in"),
    },
    entry_points={
        "console_scripts": ["megarlhf = megarlhf.cli.main:main"],
        # vLLM loads these in each of its processes: how our weight transfer comes to be known there.
        "vllm.general_plugins": ["megarlhf_shared_file = megarlhf.rollout.weight_transfer:register"],
    },
)
