"""What the nodes of a Ray cluster see of the driver's files, and the logs of those without its run directory."""

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.roles import RoleSpec
from megarlhf.planner.placement import PlacementPlan

_POLL_SECONDS = 1.0
_ANSWER_SECONDS = 10.0  # of a follower, before it is asked again later
Places = Mapping[int, PlacementGroupSchedulingStrategy]  # where tasks of each node of a plan go


def nodes_without_run_directory(
    config: PPOConfig, plan: PlacementPlan, places: Places, *, timeout_seconds: float
) -> list[int]:
    """Nodes of a plan that do not see the driver's run directory, as those with models that train must.

    Raises:
        RuntimeError: a node does not see what its workers read or write; says which node and what.
    """

    @ray.remote(num_cpus=0)
    def missing(paths: list[str]) -> tuple[str, list[str]]:
        return ray.util.get_node_ip_address(), [path for path in paths if not os.path.exists(path)]

    save = Path(config.logging.save).absolute()
    save.mkdir(parents=True, exist_ok=True)
    errors, blind = [], []
    with tempfile.NamedTemporaryFile(dir=save, prefix=".seen-by-nodes-") as marker:  # no other directory has that name
        calls = {}
        for node, place in places.items():
            roles = {worker.role.name: worker.role for worker in plan.workers if worker.node == node}
            paths = [marker.name, *_read(config, list(roles.values()))]
            calls[node] = missing.options(scheduling_strategy=place).remote(paths), roles.values()
        for node, (call, found) in calls.items():
            address, lacking = ray.get(call, timeout=timeout_seconds)
            names = ", ".join(role.name for role in found)
            if marker.name in lacking:
                blind.append(node)
                lacking = [str(save)] * any(role.trains for role in found) + lacking[1:]
            errors += [f"node {address}, of {names}, does not see {path}" for path in lacking]
    if errors:
        raise RuntimeError("\n".join([*errors, "have the nodes share these directories, or copy what is only read"]))
    return blind


def _read(config: PPOConfig, roles: list[RoleSpec]) -> list[str]:
    """What workers of these roles read; they all have the driver's working directory."""
    starts = [role.start(config)[1] for role in roles]
    return [os.path.abspath(path) for path in dict.fromkeys([*starts, config.model.tokenizer or starts[0]])]


class _Follower:
    """Reads the logs that workers of its node write there; it lives on when they die."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="megarlhf-logs-"))
        self._read: dict[str, int] = {}

    def directory(self) -> str:
        """Where they write."""
        return str(self._directory)

    def news(self) -> dict[str, bytes]:
        """What each file has got since the last call."""
        found = {}
        for path in self._directory.iterdir():
            with path.open("rb") as file:
                file.seek(self._read.get(path.name, 0))
                found[path.name] = file.read()
                self._read[path.name] = file.tell()
        return found

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self._directory)


class NodeLogs:
    """Logs of workers on nodes that do not see the run directory: written there, and brought here every second.

    Args:
        directory: of the logs here.
        places: of those nodes.
    """

    def __init__(self, directory: Path, places: Places, *, timeout_seconds: float) -> None:
        self._here = directory
        started = ray.remote(_Follower)
        self._followers: dict[int, Any] = {
            node: started.options(num_cpus=0, scheduling_strategy=place).remote() for node, place in places.items()
        }
        self._there = {
            node: str(ray.get(follower.directory.remote(), timeout=timeout_seconds))
            for node, follower in self._followers.items()
        }
        self._asked: dict[int, Any] = {}  # calls whose answer is late
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        if self._followers:
            directory.mkdir(parents=True, exist_ok=True)
            self._thread.start()

    def path(self, node: int, log_file: str) -> str:
        """Where a worker of a node is to write what belongs into a file here."""
        return str(Path(self._there[node]) / Path(log_file).name) if node in self._there else log_file

    def collect(self) -> None:
        """Bring what there is."""
        with self._lock:
            for node, follower in list(self._followers.items()):
                call = self._asked.pop(node, None) or follower.news.remote()
                try:
                    news = ray.get(call, timeout=_ANSWER_SECONDS)
                except ray.exceptions.GetTimeoutError:
                    self._asked[node] = call
                    continue
                except ray.exceptions.RayError as error:
                    del self._followers[node]
                    print(f"logs of node {node} are not brought here any more: {error}", file=sys.stderr)
                    continue
                for name, text in news.items():
                    with (self._here / name).open("ab") as file:
                        file.write(text)

    def close(self) -> None:
        """Bring the last of it, and delete it there."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self.collect()
        calls: list[Any] = [follower.remove.remote() for follower in self._followers.values()]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=_ANSWER_SECONDS)

    def _poll(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            self.collect()
