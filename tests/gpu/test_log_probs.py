"""Chunked log-probs on the device against torch.log_softmax in float64 on the CPU, and how much memory they take."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megarlhf.parallel.vocab import OutputDistribution, vocab_parallel_log_probs
from tests.gpu.devices import on_cpu_and_gpu


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one computation."""

    tokens: int
    chunk: int
    vocabulary: int  # of which the last 37 rows are padding
    hidden: int


SIZES = {
    "cpu": Sizes(tokens=60, chunk=8, vocabulary=1024, hidden=8),
    "cuda": Sizes(tokens=1024, chunk=128, vocabulary=65536, hidden=128),
}
PADDING = 37
# Of log-probs and entropy, absolute; of gradients, the length of the difference by the gradient's. Under bfloat16 each
# logit, some units large, is rounded to 8 bits, and so is each gradient of one.
ALLOWED = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (0.05, 0.02)}


def inputs(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weights, targets, and the loss's weights of the log-probs, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sizes.tokens, sizes.hidden, generator=generator)
    weight = torch.randn(sizes.vocabulary, sizes.hidden, generator=generator) / sizes.hidden**0.5
    weight[-PADDING:] = 20.0  # must not count, however large
    targets = torch.randint(0, sizes.vocabulary - PADDING, (sizes.tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets, torch.randn(sizes.tokens, generator=generator)


def oracle(sizes: Sizes, dtype: torch.dtype) -> dict[str, Tensor]:
    """The plain way, in float64."""
    hidden, weight, targets, factors = inputs(sizes, dtype)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_softmax = (hidden @ weight[:-PADDING].t()).log_softmax(-1)
    log_probs = log_softmax.gather(-1, targets[:, None])[:, 0]
    (log_probs * factors).sum().backward()
    entropy = -(log_softmax.detach().exp() * log_softmax.detach()).sum(-1)
    assert hidden.grad is not None and weight.grad is not None
    return {"log_probs": log_probs.detach(), "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}


class Meter:
    """Peak memory of what is computed on it; 0 on a CPU, where tests/parallel watches the chunks themselves."""

    def __init__(self, name: str) -> None:
        self._gpu = name == "cuda"

    def start(self) -> None:
        if self._gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self._before if self._gpu else 0


@on_cpu_and_gpu
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
def test_log_probs_and_memory(device: str, dtype: torch.dtype) -> None:
    sizes, meter = SIZES[device], Meter(device)
    of = OutputDistribution(vocab_size=sizes.vocabulary - PADDING, chunk_tokens=sizes.chunk)
    hidden, weight, targets, factors = (tensor.to(device) for tensor in inputs(sizes, dtype))
    whole = 4 * sizes.tokens * sizes.vocabulary
    chunk = sizes.chunk * sizes.vocabulary * (4 if dtype == torch.float32 else 4 + dtype.itemsize)
    gradients = weight.numel() * (4 if dtype == torch.float32 else 4 + 2 * dtype.itemsize)  # sum, product, result

    hidden.requires_grad_()
    weight.requires_grad_()
    for _ in range(2):  # the first time each thread's cuBLAS allocates what it keeps
        hidden.grad = weight.grad = None
        meter.start()
        log_probs, entropy = vocab_parallel_log_probs(hidden, weight, targets, of=of, entropy="metric")
        (log_probs * factors).sum().backward()
        peak = meter.peak()
    assert peak <= 2 * chunk + gradients < whole, "nowhere near all logits"

    meter.start()
    with torch.no_grad():
        without, _ = vocab_parallel_log_probs(hidden, weight, targets, of=of, entropy="metric")
    assert meter.peak() <= 1.3 * chunk < 0.5 * whole, "a chunk and what is computed beside it"
    assert torch.equal(without, log_probs)

    expected, (absolute, relative) = oracle(sizes, dtype), ALLOWED[dtype]
    assert entropy is not None and hidden.grad is not None and weight.grad is not None
    for name, found in {"log_probs": log_probs.detach(), "entropy": entropy}.items():
        assert found.device.type == device and found.dtype == torch.float32
        torch.testing.assert_close(found.cpu().double(), expected[name], atol=absolute, rtol=0)
    for name, gradient in {"hidden": hidden.grad, "weight": weight.grad}.items():
        difference = (gradient.cpu().double() - expected[name]).norm() / expected[name].norm()
        assert float(difference) < relative, name
    assert (weight.grad[-PADDING:] == 0).all()
