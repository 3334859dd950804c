"""Waits until all nodes of a job have joined its Ray cluster, and names those that have not.

    python slurm/ray_ready.py HEAD_IP:PORT SECONDS NODE=IP [NODE=IP...]

The token is in RAY_AUTH_TOKEN.
"""

import logging
import os
import sys
import time

os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported

import ray


def missing(nodes: dict[str, str]) -> dict[str, str]:
    """Of the nodes, by name with their addresses, those that are not alive in the cluster."""
    alive = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return {name: address for name, address in nodes.items() if address not in alive}


def main(address: str, seconds: str, *named: str) -> int:
    """Returns the exit status, 1 where the time is over."""
    nodes = dict(each.split("=", 1) for each in named)
    deadline = time.monotonic() + float(seconds)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    while (lacking := missing(nodes)) and time.monotonic() < deadline:
        time.sleep(0.5)
    for name, ip in lacking.items():
        print(f"no Ray on node {name} ({ip}) after {seconds} s: see ray-*.{name}.log beside this log", file=sys.stderr)
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
