"""Who may import whom: the floors of the house, and the folders where a backend's name may appear.

Reads every module with ast, so nothing is imported. An import inside a function or under TYPE_CHECKING counts as well.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megarlhf"

FLOORS = {
    "cli": 6,
    "cluster": 5,
    "trainers": 4,
    "reward": 4,
    "rollout": 3,
    "conversion": 3,
    "engine": 3,
    "models": 2,
    "planner": 2,
    "algos": 1,
    "data": 1,
    "parallel": 1,
    "config": 1,
    "metrics": 1,
    "formats": 0,
}
SHARED = {"megarlhf", "megarlhf.data.types"}  # any floor may import these: the version, and records without behaviour
HOMES = {"ray": {"cluster"}, "vllm": {"rollout"}, "megatron": {"parallel", "models", "engine", "conversion"}}
DEVICE_WORD = re.compile(r"(?<![a-z])(cuda|nccl|gloo)(?![a-z])")  # upper case is a message to the user
DEVICE_HOMES = {"parallel", "rollout"}
Graph = dict[str, set[str]]


def module_name(path: Path, package: Path) -> str:
    """Dotted name of a file of the package."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(module: str) -> str:
    """Folder of a dotted name; "" for modules at the top of the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else ""


def imports(tree: ast.Module, path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import; `from a import b` gives a.b, or a where b is no module of the package."""
    here = module_name(path, package).split(".")
    around = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(around[: len(around) + 1 - node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                whole = package.parent.joinpath(*source.split("."), alias.name)
                is_module = whole.is_dir() or whole.with_suffix(".py").exists()
                yield node.lineno, f"{source}.{alias.name}" if is_module or source == "torch" else source
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every name and string of the code; docstrings and other bare strings are prose."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "module", "asname"):
            text = getattr(node, field, None)
            if isinstance(text, str):
                yield getattr(node, "lineno", 0), text
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value


def import_mistake(folder: str, target: str) -> str | None:
    """The rule that a module of `folder` breaks by importing `target`; None where it may."""
    top, _, rest = target.partition(".")
    if top in HOMES and folder not in HOMES[top]:
        return f"{top} is imported only in {', '.join(sorted(HOMES[top]))}"
    if folder == "algos":
        ours = target.startswith("megarlhf.algos") or target == "megarlhf"
        if not (ours or top in sys.stdlib_module_names or top == "torch") or rest.startswith("distributed"):
            return "algos imports torch alone, without torch.distributed"
    if top != "megarlhf" or target in SHARED or folder_of(target) == folder:
        return None
    if not folder_of(target):
        return f"{target} is on no floor: name its folder in FLOORS"
    if not folder:
        return None if folder_of(target) == "cli" else "a top-level module imports nothing but cli"
    if FLOORS[folder_of(target)] >= FLOORS[folder]:
        return f"floor {FLOORS[folder]} imports only from lower floors or its own folder"
    return None


def circle(graph: Graph) -> list[str] | None:
    """A path of the graph that comes back to where it began; None where there is none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for following in sorted(graph.get(node, ())):
            if found := walk(following, [*path, node]):
                return found
        done.add(node)
        return None

    return next((found for node in sorted(graph) if (found := walk(node, []))), None)


def violations(package: Path) -> list[str]:
    """Every broken rule of a package, one sentence each."""
    found: list[str] = []
    modules: Graph = {}
    folders: Graph = {}
    for path in sorted(package.rglob("*.py")):
        name, place = module_name(path, package), path.relative_to(package)
        folder = folder_of(name)
        if not folder and len(place.parts) > 1:
            found.append(f"{place}: the folder is on no floor: name it in FLOORS")
            continue
        tree = ast.parse(path.read_text())
        for line, target in imports(tree, path, package):
            if mistake := import_mistake(folder, target):
                found.append(f"{place}:{line}: imports {target}; {mistake}")
            if target.startswith("megarlhf."):
                modules.setdefault(name, set()).add(target)
                if folder_of(target) != folder and target not in SHARED:
                    folders.setdefault(folder, set()).add(folder_of(target))
        if folder not in DEVICE_HOMES:
            for line, text in words(tree):
                if match := DEVICE_WORD.search(text):
                    found.append(f"{place}:{line}: {match[0]!r} stands only in {', '.join(sorted(DEVICE_HOMES))}")
    for graph in (modules, folders):
        if path_back := circle(graph):
            found.append(f"circle: {' -> '.join(path_back)}")
    return found


def test_the_package_keeps_to_its_floors() -> None:
    assert violations(PACKAGE) == []


GOOD = {
    "__init__.py": "__version__ = '1'",
    "__main__.py": "from megarlhf.cli.main import main",
    "cli/main.py": "from megarlhf import __version__\nfrom megarlhf.cluster import launch",
    "cluster/launch.py": "import ray\nfrom megarlhf.trainers import rl",
    "trainers/rl.py": "from megarlhf.algos.losses import policy_loss",
    "algos/losses.py": "import math\nfrom torch import Tensor\nfrom .masked import mean",
    "algos/masked.py": '"""Runs on cuda, too."""\nimport torch  # cuda',
    "engine/build.py": "from megatron.core import mpu\nfrom megarlhf.parallel.device import device\nvllm_num = 1",
    "parallel/device.py": "from megarlhf.data.types import Sample\nbackend = 'nccl'",
    "planner/memory.py": "message = 'needs CUDA'\nis_cudalike = True",
    "rollout/engine.py": "import vllm\ndevice = 'cuda:0'",
    "config/checks.py": "import megarlhf",
    "reward/rules.py": "from megarlhf.config.checks import a",
    "data/types.py": "",
}


def write_package(root: Path, files: dict[str, str]) -> Path:
    package = root / "megarlhf"
    for name, text in files.items():
        package.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        package.joinpath(name).write_text(text)
    return package


def test_a_package_that_keeps_the_rules_passes(tmp_path: Path) -> None:
    assert violations(write_package(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("models/up.py", "def f():\n    from megarlhf.engine.build import x", "up.py:2: .*floor 2 imports only from"),
        ("models/up.py", "import megarlhf.rollout.engine", "floor 2"),
        ("trainers/up.py", "from ..cluster import launch", "imports megarlhf.cluster.launch; floor 4"),
        ("reward/side.py", "from megarlhf.trainers.rl import x", "floor 4"),
        ("metrics/side.py", "from megarlhf.config.checks import x", "floor 1"),
        ("trainers/r.py", "import ray", "ray is imported only in cluster"),
        ("cluster/v.py", "from vllm.config import X", "vllm is imported only in rollout"),
        ("cluster/v.py", "import importlib\nimportlib.import_module('vllm.x')", "v.py:2: .*vllm is imported only"),
        ("planner/m.py", "import megatron.core as mcore", "megatron .* only in conversion, engine, models, parallel"),
        ("algos/n.py", "import numpy", "algos imports torch alone"),
        ("algos/n.py", "from torch import distributed", "algos imports torch alone"),
        ("algos/n.py", "from megarlhf.data.types import Sample", "algos imports torch alone"),
        ("engine/d.py", "import torch\ntorch.cuda.synchronize()", "d.py:2: 'cuda' stands only in parallel, rollout"),
        ("engine/d.py", "x = f'cuda:{0}'", "'cuda' stands only in"),
        ("engine/d.py", "def run(*, use_nccl=True): ...", "'nccl' stands only in"),
        ("cluster/d.py", "backend = 'cpu:gloo'", "'gloo' stands only in"),
        ("engine/d.py", "from torch.cuda import Stream", "'cuda' stands only in"),
        ("utils/x.py", "", "utils/x.py: the folder is on no floor"),
        ("cli/t.py", "import megarlhf.tools", "megarlhf.tools is on no floor"),
        ("__main__.py", "from megarlhf.trainers.rl import x", "a top-level module imports nothing but cli"),
        ("algos/masked.py", "from megarlhf.algos.losses import x", r"circle: \S+losses -> \S+masked -> \S+losses"),
        ("data/types.py", "from megarlhf.parallel.device import x", r"circle: \S+data.types -> \S+parallel.device"),
        ("algos/losses.py", "import megarlhf.trainers.rl", "circle: trainers -> algos -> trainers"),
    ],
)
def test_a_broken_rule_is_caught(tmp_path: Path, name: str, text: str, message: str) -> None:
    found = violations(write_package(tmp_path, {**GOOD, name: text}))
    assert any(re.search(message, line) for line in found), found
