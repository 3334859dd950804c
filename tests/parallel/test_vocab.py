"""Vocabulary-parallel log-probs and entropy against torch's own log_softmax in float64, values and gradients."""

import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megarlhf.parallel import vocab
from megarlhf.parallel.groups import ParallelSizes, destroy_groups, initialize_groups
from megarlhf.parallel.vocab import EntropyUse, OutputDistribution, vocab_parallel_log_probs
from tests.distributed.pool import RankPool

TOKENS, HIDDEN, VOCAB, PADDED = 7, 5, 37, 48


@dataclass(frozen=True)
class Case:
    """One computation."""

    of: OutputDistribution
    entropy: EntropyUse = "loss"
    frozen: bool = False  # the weights take no gradient
    dtype: torch.dtype = torch.float32
    tokens: int = TOKENS


PLAIN = Case(OutputDistribution(vocab_size=VOCAB, chunk_tokens=3))


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weights with padding rows, targets, and the loss's weights of log-probs and entropy."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.tokens, HIDDEN, generator=generator)
    weight = 0.7 * torch.randn(PADDED, HIDDEN, generator=generator)
    weight[VOCAB:] = 20.0  # padding must not count, however large
    targets = torch.randint(0, VOCAB, (case.tokens,), generator=generator)
    a, b = torch.randn(2, case.tokens, generator=generator)
    return hidden.to(case.dtype), weight.to(case.dtype), targets, a, b


def oracle(case: Case) -> dict[str, Tensor]:
    """All of it the plain way, in float64; weights and hidden states have been rounded to the case's dtype."""
    hidden, weight, targets, a, b = inputs(case)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ weight[:VOCAB].t()
    if case.of.soft_cap is not None:
        logits = case.of.soft_cap * torch.tanh(logits / case.of.soft_cap)
    logits = logits / case.of.temperature
    log_probs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    loss = (log_probs * a).sum() + ((entropy * b).sum() if case.entropy == "loss" else 0.0)
    loss.backward()
    found = {"log_probs": log_probs.detach(), "hidden": hidden.grad, "weight": weight.grad}
    return found | ({} if case.entropy == "unused" else {"entropy": entropy.detach()})


def compute(case: Case, rank: int, size: int, group: Any) -> dict[str, Tensor]:
    """The same by the function under test; this rank's part of the weights and of the hidden states' gradient."""
    hidden, weight, targets, a, b = inputs(case)
    hidden.requires_grad_()
    part = weight.chunk(size)[rank].clone().requires_grad_(not case.frozen)
    log_probs, entropy = vocab_parallel_log_probs(hidden, part, targets, of=case.of, entropy=case.entropy, group=group)
    loss = (log_probs * a).sum()
    if case.entropy == "loss":
        assert entropy is not None
        loss = loss + (entropy * b).sum()
    loss.backward()
    found = {"log_probs": log_probs.detach(), "hidden": hidden.grad}
    assert (entropy is None) == (case.entropy == "unused") and (part.grad is None) == case.frozen
    if entropy is not None:
        assert entropy.requires_grad == (case.entropy == "loss")
        found["entropy"] = entropy.detach()
    return found if case.frozen else found | {"weight": part.grad}


def split_case(rank: int, world_size: int, init_method: str, cases: list[Case]) -> list[dict[str, Tensor]]:
    """Over a split vocabulary."""
    from megatron.core import parallel_state

    initialize_groups(
        ParallelSizes(tensor=world_size), rank=rank, world_size=world_size, init_method=init_method, seed=1
    )
    try:
        group = parallel_state.get_tensor_model_parallel_group()
        return [compute(case, rank, world_size, group) for case in cases]
    finally:
        destroy_groups()


def check(case: Case, parts: list[dict[str, Tensor]], tolerance: float = 2e-6) -> None:
    """Every rank has the whole log-probs and entropy, and its part of the gradients."""
    expected = oracle(case)
    for part in parts:
        for name in ("log_probs", "entropy"):
            assert (name in part) == (name in expected)
            if name in part:
                assert torch.equal(part[name], parts[0][name])
                torch.testing.assert_close(part[name].double(), expected[name], atol=tolerance, rtol=0)
    grad_hidden = torch.stack([part["hidden"].double() for part in parts]).sum(0)
    torch.testing.assert_close(grad_hidden, expected["hidden"], atol=5 * tolerance, rtol=0)
    if not case.frozen:
        grad_weight = torch.cat([part["weight"] for part in parts])
        torch.testing.assert_close(grad_weight.double(), expected["weight"], atol=5 * tolerance, rtol=0)
        assert (grad_weight[VOCAB:] == 0).all()


CASES = {
    **{f"chunks of {n}": replace(PLAIN, of=replace(PLAIN.of, chunk_tokens=n)) for n in (1, 3, 7, 100)},
    "temperature": replace(PLAIN, of=replace(PLAIN.of, temperature=0.7)),
    "soft cap": replace(PLAIN, of=replace(PLAIN.of, soft_cap=2.5)),
    "soft cap, temperature": replace(PLAIN, of=replace(PLAIN.of, soft_cap=4.0, temperature=0.6)),
    "soft cap, no entropy": replace(PLAIN, of=replace(PLAIN.of, soft_cap=2.5), entropy="unused"),
    "entropy as a metric": replace(PLAIN, entropy="metric"),
    "no entropy": replace(PLAIN, entropy="unused"),
    "frozen": replace(PLAIN, frozen=True),
    "no tokens": replace(PLAIN, tokens=0),
    "float64": replace(PLAIN, of=replace(PLAIN.of, soft_cap=3.0, temperature=0.8), dtype=torch.float64),
}


@pytest.mark.parametrize("name", CASES)
def test_a_whole_vocabulary(name: str) -> None:
    case = CASES[name]
    check(case, [compute(case, 0, 1, None)], 1e-13 if case.dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("world_size", [2, 3, 4])  # at 4 the last rank holds padding only, at 3 some
def test_a_split_vocabulary(ranks: RankPool, world_size: int) -> None:
    cases = list(CASES.values())
    by_rank = ranks.run(world_size, split_case, cases)
    for number, case in enumerate(cases):
        check(case, [found[number] for found in by_rank])


def test_targets_whose_probability_is_no_float32() -> None:
    case = Case(OutputDistribution(vocab_size=VOCAB, chunk_tokens=3, temperature=0.02, soft_cap=3.0), "loss")
    expected, found = oracle(case), compute(case, 0, 1, None)
    assert float(expected["log_probs"].min()) < -150  # exp() of it is 0
    torch.testing.assert_close(found["log_probs"].double(), expected["log_probs"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found["hidden"].double(), expected["hidden"], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [2, 100])
def test_bfloat16_weights(chunk_tokens: int) -> None:
    """Logits and their gradients are rounded to bfloat16, sums are not."""
    case = Case(OutputDistribution(vocab_size=VOCAB, chunk_tokens=chunk_tokens), "loss", dtype=torch.bfloat16)
    hidden, weight, targets, _, _ = inputs(case)
    found, expected = compute(case, 0, 1, None), oracle(case)
    logits = (hidden @ weight[:VOCAB].t()).double()
    rounded = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(found["log_probs"].double(), rounded, atol=2e-6, rtol=0)
    for name in ("hidden", "weight"):
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name].double(), expected[name], atol=0.06, rtol=0.02)


def test_gradients_of_many_bfloat16_chunks_are_added_in_float32() -> None:
    case = Case(OutputDistribution(vocab_size=VOCAB, chunk_tokens=1), "unused", dtype=torch.bfloat16, tokens=400)
    errors = {}
    for chunk_tokens in (1, 400):
        each = replace(case, of=replace(case.of, chunk_tokens=chunk_tokens))
        expected = oracle(each)["weight"]
        errors[chunk_tokens] = float((compute(each, 0, 1, None)["weight"].double() - expected).norm())
    assert errors[1] < 1.3 * errors[400]  # added in bfloat16 it is several times as much


def test_products_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk's logits at once; every chunk but the last is computed again for the gradient, none without one."""
    sizes: list[int] = []
    scores = vocab.OutputShard.scores

    def watch(self: Any, hidden: Tensor, rows: Tensor, buffer: Tensor) -> Tensor:
        sizes.append(len(hidden))
        assert len(buffer) == min(self.of.chunk_tokens, TOKENS)
        return scores(self, hidden, rows, buffer)

    monkeypatch.setattr(vocab.OutputShard, "scores", watch)
    compute(PLAIN, 0, 1, None)
    assert sizes == [3, 3, 1, 3, 3]
    sizes.clear()
    compute(replace(PLAIN, of=replace(PLAIN.of, chunk_tokens=7)), 0, 1, None)
    assert sizes == [7]
    sizes.clear()
    hidden, weight, targets, _, _ = inputs(PLAIN)
    with torch.no_grad():
        vocab_parallel_log_probs(hidden, weight, targets, of=PLAIN.of)
    assert sizes == [3, 3, 1]


class Held(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def freed(self, storage: int, num_bytes: int) -> None:
        self.storages.remove(storage)
        self.now -= num_bytes


@pytest.mark.parametrize(("entropy", "soft_cap", "backward"), [("metric", None, 1.125), ("loss", 30.0, 1.25)])
def test_peak_memory(entropy: EntropyUse, soft_cap: float | None, backward: float) -> None:
    """Over a chunk of logits an eighth of one, and one more for the gradient of entropy; small tensors aside."""
    of, chunk = OutputDistribution(vocab_size=20_000, chunk_tokens=32, soft_cap=soft_cap), 4 * 32 * 20_000
    with Held() as held:
        hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(20_000, 4)
        before, held.peak = held.now, 0
        log_probs, entropies = vocab_parallel_log_probs(hidden, weight, torch.arange(64), of=of, entropy=entropy)
        forward, held.peak = held.peak - before, 0
        assert entropies is not None
        (log_probs + entropies).sum().backward()
    assert forward / chunk == pytest.approx(1.125, abs=0.01)
    assert (held.peak - before) / chunk == pytest.approx(backward, abs=0.01)
