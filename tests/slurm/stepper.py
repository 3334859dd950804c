"""A run as slurm/ppo_ray.sbatch sees one: it uses its Ray cluster in two steps, the second of which never ends."""

import argparse
import os
import signal
import socket
import time
from pathlib import Path

import ray


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ray_address", required=True)
    parser.add_argument("--load_checkpoint", action="store_true", required=True)
    given = parser.parse_args()
    signal.signal(signal.SIGUSR1, lambda number, frame: print("heard", flush=True))
    ray.init(address=given.ray_address, log_to_driver=False)

    @ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
    def where() -> str:
        time.sleep(0.5)
        return socket.gethostname()

    for step in (1, 2):
        hosts = sorted(set(ray.get([where.remote() for _ in range(4)])))
        print(f"step {step} on {' '.join(hosts)}, seed {os.environ.get('SEED')}", flush=True)
    (Path(os.environ["SAVE"]) / "waiting").touch()
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
