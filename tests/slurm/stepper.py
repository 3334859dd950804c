"""A run as the scripts of slurm/ see one: it goes on where it was, ends its step at SIGUSR1, and uses Ray."""

import argparse
import os
import signal
import socket
import sys
import time
from pathlib import Path

import ray

STOPPED: list[int] = []


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ray_address", required=True)
    parser.add_argument("--load_checkpoint", action="store_true", required=True)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--wait", action="store_true", help="in the second step, for the signal")
    parser.add_argument("--deaf", action="store_true", help="and do not end for it")
    given = parser.parse_args()
    signal.signal(signal.SIGUSR1, lambda number, frame: STOPPED.append(number))
    done = Path(os.environ["SAVE"]) / "steps"
    ray.init(address=given.ray_address, log_to_driver=False)

    @ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
    def where() -> str:
        time.sleep(0.5)
        return socket.gethostname()

    step = int(done.read_text()) if done.exists() else 0
    while step < given.steps and not STOPPED:
        hosts = sorted(set(ray.get([where.remote() for _ in range(4)])))
        print(f"step {step + 1} on {' '.join(hosts)}, seed {os.environ.get('SEED')}", flush=True)
        while given.wait and step == 1 and (given.deaf or not STOPPED):
            (done.parent / "waiting").touch()
            time.sleep(0.1)
        step += 1
        done.write_text(str(step))
    return 0


if __name__ == "__main__":
    sys.exit(main())
