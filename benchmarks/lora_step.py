"""A training step of LoRA against one of all weights: seconds, bytes by part, largest resident set. CPU cores.

    python examples/smollm2.py models/smollm2
    python benchmarks/lora_step.py --model models/smollm2          # about 4 minutes
    python benchmarks/lora_step.py --smoke                         # one tiny step of each side, for CI

Sides take turns, each in a process of its own on the same cores: the engine alone, one rank, fp32, the same rows of one
length whose loss is of every token. A step of all weights takes 6 operations a weight and token, two for each of the
products of the forward pass, of the inputs' gradients and of the weights' gradients; frozen weights have none of the
last, so at most a third of the step can go, and adapters take some of it back. The run ends where a frozen weight has a
gradient after all. The first step of a process is left out. The process's CPU seconds say more than the clock's where
other work is on the machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.sides import ROOT, run_side

RANKS = {"all weights": 0, "LoRA, attention": 16, "LoRA, all-linear": 16}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PARTS = ("parameters", "gradients", "optimizer")


def resident(field: str) -> int:
    """Bytes of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Steps of one side in this process."""
    import numpy as np
    import torch

    from megarlhf.config.layouts import KernelArguments, LayoutArguments
    from megarlhf.config.lora import LoraArguments
    from megarlhf.data.planning import PackingOptions
    from megarlhf.data.types import training_rows
    from megarlhf.engine.engine import MegatronEngine
    from megarlhf.engine.optimizer import OptimizerOptions
    from megarlhf.models.build import ModelOptions
    from megarlhf.parallel.groups import ParallelSizes, destroy_groups, initialize_groups
    from megarlhf.trainers.sft import sft_objective

    torch.set_num_threads(options.threads)
    before = resident("VmRSS")
    targets = ATTENTION if side == "LoRA, attention" else ("all-linear",)
    lora = LoraArguments(lora_rank=RANKS[side], target_modules=targets) if RANKS[side] else LoraArguments()
    with tempfile.TemporaryDirectory() as meeting:
        initialize_groups(ParallelSizes(), rank=0, world_size=1, init_method=f"file://{meeting}/ranks", seed=1)
        engine = MegatronEngine(
            options.model,
            head="lm",
            model=ModelOptions(
                bf16=False, layout=LayoutArguments(), kernels=KernelArguments(transformer_impl="local"), lora=lora
            ),
            packing=PackingOptions(max_tokens=options.rows * options.length // 2, share_prefix=False),
            optimizer=OptimizerOptions(learning_rate=1e-4, total_steps=100),
            logprob_chunk_tokens=1024,
        )
        draw, seconds, cpu_seconds = np.random.default_rng(3), [], []
        ids = draw.integers(3, engine.hf.vocab_size, (options.rows, options.length + 1), dtype=np.int32)
        rows = training_rows(list(ids), [1] * options.rows)
        for _ in range(1 + options.steps):
            started, cpu_started = time.perf_counter(), time.process_time()
            engine.train_step(rows, sft_objective(), denominator=float(options.rows * options.length))
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
        parameters = [parameter for _, parameter in engine.named_parameters()]
        trained = [p for p in parameters if getattr(p, "main_grad", None) is not None or p.grad is not None]
        assert all(p.requires_grad for p in trained), "a frozen weight has a gradient"
        found = {
            "seconds": seconds[1:],
            "cpu_seconds": cpu_seconds[1:],
            "trained": sum(p.numel() for p in trained),
            "peak": resident("VmHWM") - before,
            **{part: held for part, held in engine.memory.largest_bytes().items() if part in PARTS},
        }
        destroy_groups()
    return found


def compare(options: argparse.Namespace) -> None:
    """Sides in turns, then the table; ratios are medians of rounds."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in RANKS}
    for number in range(1, options.rounds + 1):
        for side, runs in found.items():
            runs.append(run_side(__file__, side, options, ("model", "rows", "length", "steps", "threads")))
            listed = ", ".join(f"{one:.2f}" for one in runs[-1]["seconds"])
            print(f"round {number}, {side}: {listed} s", flush=True)
    baseline, *_ = found.values()
    print(f"\n{options.rows} rows of {options.length} tokens, rank {max(RANKS.values())}; MiB")
    print(f"{'':<18}{'s/step':>8}{'ratio':>7}{'CPU s':>8}{'ratio':>7}{'trained':>13}", end="")
    print("".join(f"{part:>12}" for part in (*PARTS, "peak")))
    for side, runs in found.items():
        print(f"{side:<18}", end="")
        for clock in ("seconds", "cpu_seconds"):
            ratios = [median(a[clock]) / median(b[clock]) for a, b in zip(runs, baseline, strict=True)]
            print(f"{median(one for run in runs for one in run[clock]):>8.2f}{median(ratios):>7.2f}", end="")
        sizes = [median(run[part] for run in runs) / 2**20 for part in (*PARTS, "peak")]
        print(f"{runs[0]['trained']:>13,}" + "".join(f"{size:>12.0f}" for size in sizes))


def main() -> None:
    """Compare the sides, or measure one and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face checkpoint, such as SmolLM2")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores")
    parser.add_argument("--smoke", action="store_true", help="one step of a tiny model; the times mean nothing")
    parser.add_argument("--side", choices=tuple(RANKS), help="run only this side, in this process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lora_step_") as name:
        if options.smoke:
            options.rows, options.length, options.steps, options.rounds = 4, 16, 1, 1
            options.model = str(Path(name) / "model")
            assets = ROOT / "examples" / "demo" / "make_assets.py"
            subprocess.run([sys.executable, str(assets), name, "--seed", "1"], check=True)
        if options.model is None:
            parser.error("--model is needed: python examples/smollm2.py models/smollm2 writes one")
        if options.side is None:
            compare(options)
        else:
            print(json.dumps(measure(options.side, options)))


if __name__ == "__main__":
    main()
