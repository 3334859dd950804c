"""What comparisons of sides share: texts, sides in turn, the machine's matrix products."""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_WORDS = (
    "the harbour office keeps three kinds of books and writes every ship that came in with its captain cargo day left "
    "again second holds weather each morning evening by whoever had watch few words about wind cloud swell third is "
    "oldest it names boats town built itself who paid for timber what became them last winter cellar flooded ink some "
    "pages ran two students now copy can still be read into table one line page mark word they guess have finished"
).split()


Step = dict[str, float]  # "seconds", "tokens" that are no padding, and for megarlhf "operations" of matrix products


def text(draw: random.Random, words: int) -> str:
    """Words of English, half of the texts fewer than `words`, none more than twice as many, as the lengths of chats."""
    return " ".join(draw.choices(_WORDS, k=max(1, min(2 * words, int(draw.lognormvariate(0.0, 0.7) * words)))))


def matrix_rate(threads: int) -> float:
    """Floating-point operations a second of this machine's fp32 matrix products, of a small model's sizes."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.randn(2048, 576), torch.randn(576, 1536)
    rates = []
    for _ in range(30):
        started = time.perf_counter()
        torch.mm(left, right)
        rates.append(2 * 2048 * 576 * 1536 / (time.perf_counter() - started))
    return median(rates)


def num_parameters(model: str) -> int:
    """Numbers in the products of a token's forward pass: all weights, a tied embedding once."""
    from transformers import AutoModelForCausalLM

    return sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())


def step_clock() -> tuple[Any, list[float]]:
    """A callback of Transformers' Trainer, and the seconds of each of its steps."""
    from transformers import TrainerCallback

    seconds: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Wall time of each step, from before its batch's forward pass to after the optimizer."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    return Clock(), seconds


def run_ours(module: str, flags: dict[str, str], switches: Sequence[str], save: Path) -> list[dict[str, float]]:
    """Run a program of megarlhf in a process of its own; the rows of its metrics."""
    words = [word for pair in (flags | {"--save": str(save)}).items() for word in pair]
    command = [sys.executable, "-m", f"megarlhf.cli.{module}", *words, *switches]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


Run = Callable[[argparse.Namespace, Path], list[Step]]


def main(script: str, doc: str | None, runs: Mapping[str, Run]) -> None:
    """Compare the sides, the last of which is megarlhf, or run one and print its steps as JSON on the last line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face checkpoint, such as SmolLM2")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores")
    parser.add_argument(
        "--words", type=int, default=80, help="half of all texts are shorter; the longest have twice as many"
    )
    parser.add_argument("--max_len", type=int, default=512, help="longest row in tokens")
    parser.add_argument("--smoke", action="store_true", help="one step of a tiny model; the times mean nothing")
    parser.add_argument("--side", choices=tuple(runs), help="run only this side, in this process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vs_trl_") as name:
        directory = Path(name)
        if options.smoke:  # its tokens are letters
            options.steps, options.rounds, options.words, options.max_len = 1, 1, 2, 56
            options.model = str(directory / "model")
            assets = ROOT / "examples" / "demo" / "make_assets.py"
            subprocess.run([sys.executable, str(assets), name, "--seed", "1"], check=True)
        if options.model is None:
            parser.error("--model is needed: python examples/smollm2.py models/smollm2 writes one")
        if options.side is None:
            _compare(script, list(runs), options)
        else:
            print(json.dumps(runs[options.side](options, directory)))


def _compare(script: str, sides: Sequence[str], options: argparse.Namespace) -> None:
    """Sides in turns, without the first step of each, which warms up; then the table and the share of the machine."""
    steps: dict[str, list[Step]] = {side: [] for side in sides}
    for number in range(1, options.rounds + 1):
        for side in sides:
            measured = run_side(script, side, options, ("model", "steps", "threads", "words", "max_len"))[1:]
            steps[side] += measured
            listed = ", ".join(f"{step['seconds']:.2f}" for step in measured)
            print(f"round {number}, {side}: {listed} s", flush=True)
    print(f"\n{'side':<16}{'steps':>6}{'median s/step':>15}{'tokens/step':>13}{'tokens/s':>10}")
    rates = {}
    for side, measured in steps.items():
        tokens, seconds = (sum(step[key] for step in measured) for key in ("tokens", "seconds"))
        rates[side] = tokens / seconds
        middle = median(step["seconds"] for step in measured)
        print(f"{side:<16}{len(measured):>6}{middle:>15.2f}{tokens / len(measured):>13.0f}{rates[side]:>10.0f}")
    print()
    ours = sides[-1]
    for side in sides[:-1]:
        print(f"{ours} / {side}: {rates[ours] / rates[side]:.2f} x tokens/s")
    measured, rate = steps[ours], matrix_rate(options.threads)
    operations = sum(step["operations"] for step in measured) / sum(step["seconds"] for step in measured)
    print(f"{ours}'s step: {operations / rate:.0%} of this machine's {rate / 1e9:.0f} GFLOP/s in matrix products")


def run_side(script: str, side: str, options: argparse.Namespace, names: Sequence[str]) -> Any:
    """What a side with these options prints as JSON on its last line, in a fresh process on the first cores."""
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    done = subprocess.run(
        [sys.executable, script, "--side", side, *(f"--{name}={getattr(options, name)}" for name in names)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads)},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    return json.loads(done.stdout.splitlines()[-1])
