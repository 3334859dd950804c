"""Groups of workers that are child processes of the test, or Ray's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarlhf.cluster.group import WorkerGroup
from megarlhf.cluster.local_processes import local_processes
from megarlhf.cluster.processes import Processes
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import from_dict
from megarlhf.config.roles import ROLES
from megarlhf.planner.placement import Machine, plan_placement


@dataclass(frozen=True)
class Spec:
    """What of a WorkerSpec is read to start a process."""

    name: str
    log_file: str
    node: int = 0


@contextmanager
def processes_of(kind: str) -> Iterator[Processes]:
    """Of "children", or of "ray"."""
    if kind == "children":
        with local_processes() as found:
            yield found
        return
    from megarlhf.cluster.ray_processes import ray_processes

    config = from_dict(PPOConfig, {"pretrain": "m", "prompt_data": "d", "save": "s", "actor_num_gpus_per_node": 8})
    with ray_processes(config, plan_placement(config, Machine.alike("cpu", 1, 0, 8))) as found:
        yield found


def group_of(
    processes: Processes, role: str, worker: Any, directory: Path, count: int, *, timeout_seconds: float = 120.0
) -> WorkerGroup:
    """Ranks 0 .. count - 1 of a role, each a `worker` whose log is in the directory."""
    names = [f"{role}-{rank}" for rank in range(count)]
    specs: list[Any] = [Spec(name, str(directory / f"{name}.log")) for name in names]

    def launch(spec: Any) -> Any:
        return processes.start(worker, spec, {})

    handles = list(map(launch, specs))
    return WorkerGroup(ROLES[role], processes, handles, specs, launch=launch, timeout_seconds=timeout_seconds)
