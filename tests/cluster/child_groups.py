"""Groups of workers that are child processes of the test."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megarlhf.cluster.group import WorkerGroup
from megarlhf.cluster.processes import Processes
from megarlhf.config.roles import ROLES


def group_of(
    processes: Processes, role: str, worker: Any, directory: Path, count: int, *, timeout_seconds: float = 120.0
) -> WorkerGroup:
    """Ranks 0 .. count - 1 of a role, each a `worker` whose log is in the directory."""
    names = [f"{role}-{rank}" for rank in range(count)]
    specs = [SimpleNamespace(name=name, node=0, log_file=str(directory / f"{name}.log")) for name in names]

    def launch(spec: Any) -> Any:
        return processes.start(worker, spec, {})

    handles = list(map(launch, specs))
    return WorkerGroup(ROLES[role], processes, handles, specs, launch=launch, timeout_seconds=timeout_seconds)
