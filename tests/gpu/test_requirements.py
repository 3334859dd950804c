"""These tests import with what requirements/gpu-test.txt names, and what that needs, and with nothing else."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ALONE = """
import importlib, re, sys
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions

there, find_spec = {*sys.argv[1].split(","), "megarlhf"}, PathFinder.find_spec
owners = packages_distributions().items()
absent = {module for module, names in owners if there.isdisjoint(re.sub("[-_.]+", "-", n).lower() for n in names)}
PathFinder.find_spec = lambda name, *rest: None if name in absent else find_spec(name, *rest)
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def closure(asked: list[str]) -> set[str]:
    """Installed packages that these requirements lead to."""
    seen, queue = set[str](), [Requirement(line) for line in asked]
    while queue:
        one = queue.pop()
        name = canonicalize_name(one.name)
        if name not in seen and (one.marker is None or one.marker.evaluate({"extra": ""})):
            try:
                queue += [Requirement(line) for line in requires(name) or []]
                seen.add(name)
            except PackageNotFoundError:  # such as CUDA's libraries, where PyTorch is built for CPUs
                continue
    return seen


def test_nothing_else_is_imported() -> None:
    lines = (ROOT / "requirements" / "gpu-test.txt").read_text().splitlines()
    there = closure(["torch", *(line for line in lines if not line.startswith("#"))])
    tests = ["tests.conftest", *(f"tests.gpu.{path.stem}" for path in Path(__file__).parent.glob("*.py"))]
    command = [sys.executable, "-W", "ignore", "-c", ALONE, ",".join(there), *tests]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
