"""Log-probs of a large vocabulary with gradients, in chunks of tokens, against whole logits: peak memory and time.

    python benchmarks/log_probs.py                   # 2,048 tokens, 128,256 of vocabulary, hidden size 512; 4 minutes
    python benchmarks/log_probs.py --dtype bfloat16 --tokens 512
    python benchmarks/log_probs.py --smoke           # small, for CI

The whole way is what megarlhf did before: one product for all tokens, then log-probs and entropy from a float32 copy of
it, whose probabilities stay for the backward pass. Every run is a process of its own; ways take turns, so that a drift
of the machine meets all of them. Memory is the process's largest beyond what it held before, inputs included; each
way's gradient of the weights, as large as they are, counts. Targets are every token, as in training on responses alone.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megarlhf.parallel.vocab import EntropyUse, OutputDistribution, vocab_parallel_log_probs  # noqa: E402

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, targets -> log-probs


class Whole(torch.autograd.Function):
    """From whole logits: log p(target) and entropy; the probabilities stay and become the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[t, v] logits and [t] targets -> log-probs and entropy, [t] each."""
        shifted = logits.float().clone()
        shifted -= shifted.amax(-1)[:, None]
        rows = torch.arange(len(targets))
        chosen = shifted[rows, targets]
        exponentials = shifted.exp()
        total = exponentials.sum(-1)
        weighted = torch.einsum("tv,tv->t", exponentials, shifted)
        probabilities = exponentials.div_(total[:, None])
        ctx.save_for_backward(probabilities, targets, rows)
        ctx.dtype = logits.dtype
        ctx.set_materialize_grads(False)
        return chosen - total.log(), total.log() - weighted / total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        """Of the log-probs alone."""
        grad, targets, rows = ctx.saved_tensors
        assert grads[0] is not None and grads[1] is None
        grad.mul_(-grads[0][:, None])
        grad[rows, targets] += grads[0]
        return grad.to(ctx.dtype), None


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The way of before."""
    log_probs: Tensor = Whole.apply(torch.nn.functional.linear(hidden, weight), targets)[0]
    return log_probs


def in_chunks(chunk_tokens: int, entropy: EntropyUse) -> Compute:
    """The present way."""

    def compute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        of = OutputDistribution(vocab_size=len(weight), chunk_tokens=chunk_tokens)
        return vocab_parallel_log_probs(hidden, weight, targets, of=of, entropy=entropy)[0]

    return compute


def ways(tokens: int) -> dict[str, Compute]:
    """What is compared, the way of before first."""
    sizes = [tokens, tokens // 2, tokens // 8]
    chunked = {f"chunks of {size}, entropy as a metric": in_chunks(size, "metric") for size in sizes}
    return {"whole logits": whole} | chunked | {f"chunks of {sizes[-1]}": in_chunks(sizes[-1], "unused")}


def status(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, or VmHWM, the largest that VmRSS has been."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """One forward and backward pass in this process: seconds, bytes, and a sum of results to compare ways by."""
    torch.set_num_threads(options.threads)
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, options.dtype)
    hidden = torch.randn(options.tokens, options.hidden, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(options.vocab, options.hidden, generator=generator) / options.hidden**0.5).to(dtype)
    weight.requires_grad_()
    targets = torch.randint(0, options.vocab, (options.tokens,), generator=generator)
    compute, little = ways(options.tokens)[way], slice(0, 8)
    compute(hidden[little], weight[:64], targets[little] % 64).sum().backward()  # starts threads, loads kernels
    hidden.grad = weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    before, start = status("VmRSS"), time.perf_counter()
    log_probs = compute(hidden, weight, targets)
    forward = time.perf_counter() - start
    log_probs.mean().backward()
    seconds, peak = time.perf_counter() - start, status("VmHWM") - before
    assert hidden.grad is not None and weight.grad is not None
    norms = [float(tensor.detach().double().norm()) for tensor in (log_probs, hidden.grad, weight.grad)]
    return {"seconds": seconds, "forward": forward, "peak": peak, "norm": sum(norms)}


def compare(options: argparse.Namespace) -> None:
    """Ways in turns, then the table."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways(options.tokens)}
    sizes = [f"--{name}={getattr(options, name)}" for name in ("tokens", "vocab", "hidden", "dtype", "threads")]
    for _ in range(options.rounds):
        for way, runs in found.items():
            command = [sys.executable, __file__, "--way", way, *sizes]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    first, *_ = found.values()
    print(f"{options.tokens} tokens, vocabulary {options.vocab}, hidden size {options.hidden}, {options.dtype}")
    print(f"{'':<42}{'peak MiB':>9}{'ratio':>7}{'seconds':>9}{'ratio':>7}{'forward':>9}")
    for way, runs in found.items():
        peak, seconds, forward = (median(run[name] for run in runs) for name in ("peak", "seconds", "forward"))
        ratios = [median(a[name] / b[name] for a, b in zip(runs, first, strict=True)) for name in ("peak", "seconds")]
        print(f"{way:<42}{peak / 2**20:>9.0f}{ratios[0]:>7.2f}{seconds:>9.2f}{ratios[1]:>7.2f}{forward:>9.2f}")
        far = max(abs(run["norm"] / first[0]["norm"] - 1) for run in runs)
        assert far < (1e-6 if options.dtype == "float32" else 1e-2), f"{way}: results are {far} off"


def main() -> None:
    """Compare, or measure one way and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="small and once")
    parser.add_argument("--way", help="measure only this, in this process")
    options = parser.parse_args()
    if options.smoke:
        options.tokens, options.vocab, options.hidden, options.rounds = 64, 4096, 32, 1
    if options.way is None:
        compare(options)
    else:
        print(json.dumps(measure(options.way, options)))


if __name__ == "__main__":
    main()
