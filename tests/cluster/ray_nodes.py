"""Nodes that Ray has on this machine, each at an address of its own; what they start ends with them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from megarlhf.cluster import ray_processes

_STORE_BYTES = 80 << 20


@contextmanager
def head(address: str) -> Iterator[Cluster]:
    """A cluster of one node, which other nodes join and where drivers of this machine are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", ray_processes.TOKEN)  # which this process has read once
        own = {"node_ip_address": address, "num_cpus": 2, "object_store_memory": _STORE_BYTES}
        cluster = Cluster(initialize_head=True, head_node_args=own)
        try:
            yield cluster
        finally:
            cluster.shutdown()


def join(cluster: Cluster, address: str, *, hidden: Path | None = None) -> subprocess.Popen[bytes]:
    """Another node, up; it starts in another directory. Killed, all that it has started is killed.

    Args:
        hidden: a directory that it does not see.
    """
    nodes = _alive(cluster)
    start = f"exec {Path(sys.executable).with_name('ray')} start --block --address={cluster.address}"
    start += f" --node-ip-address={address} --num-cpus=2 --object-store-memory={_STORE_BYTES}"
    if hidden is not None:
        start = f"mount -t tmpfs none {hidden} && {start}"
    own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    words = [*own, *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c", start]
    node = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd="/", env=os.environ | {"PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 60
    while _alive(cluster) == nodes:
        assert node.poll() is None and time.monotonic() < deadline, f"node {address} does not come up"
        time.sleep(0.1)
    return node


def _alive(cluster: Cluster) -> int:
    return sum(node["Alive"] for node in cluster.global_state.node_table())
