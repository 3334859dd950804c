"""Likeliest tokens and probabilities of given tokens against torch's own softmax in float64, values and gradients."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.parallel.groups import ParallelSizes, destroy_groups, initialize_groups
from megarlhf.parallel.top_tokens import vocab_parallel_bucket_log_probs, vocab_parallel_top_tokens
from megarlhf.parallel.vocab import OutputDistribution
from tests.distributed.pool import RankPool

HIDDEN, VOCAB, PADDED = 5, 37, 48


@dataclass(frozen=True)
class Case:
    """One computation."""

    of: OutputDistribution = OutputDistribution(vocab_size=VOCAB, chunk_tokens=3)
    k: int = 4
    dtype: torch.dtype = torch.float32
    tokens: int = 7


Numbers = dict[str, Tensor]


def inputs(case: Case) -> Numbers:
    """Of a student, whose targets are among its given tokens in some places."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.tokens, HIDDEN, generator=generator).to(case.dtype)
    weight = (0.7 * torch.randn(PADDED, HIDDEN, generator=generator)).to(case.dtype)
    weight[VOCAB:] = 20.0  # padding must not count, however large
    orders = [torch.randperm(VOCAB, generator=generator)[: case.k] for _ in range(case.tokens)]
    ids = torch.stack(orders) if orders else torch.empty(0, case.k, dtype=torch.int64)
    targets = torch.randint(0, VOCAB, (case.tokens,), generator=generator)
    targets[::2] = ids[::2, 0]
    a, b = torch.randn(case.tokens, generator=generator), torch.randn(case.tokens, case.k + 1, generator=generator)
    return {"hidden": hidden, "weight": weight, "ids": ids, "targets": targets, "a": a, "b": b}


def oracle(case: Case) -> Numbers:
    """All of it the plain way, in float64."""
    given = inputs(case)
    hidden, weight = (given[name].double().requires_grad_() for name in ("hidden", "weight"))
    logits = hidden @ weight[:VOCAB].t()
    if case.of.soft_cap is not None:
        logits = case.of.soft_cap * torch.tanh(logits / case.of.soft_cap)
    log_probs = (logits / case.of.temperature).log_softmax(-1)
    chosen = log_probs.gather(-1, given["ids"])
    others = log_probs.scatter(-1, given["ids"], -torch.inf).logsumexp(-1, keepdim=True)
    target, buckets = log_probs.gather(-1, given["targets"][:, None])[:, 0], torch.cat([chosen, others], -1)
    ((target * given["a"]).sum() + (buckets * given["b"]).sum()).backward()
    best, top = log_probs.detach().topk(case.k, -1)
    rest = log_probs.detach().scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    assert hidden.grad is not None and weight.grad is not None
    found = {"targets": target.detach(), "buckets": buckets.detach(), "top": top, "best": torch.cat([best, rest], -1)}
    return found | {"hidden": hidden.grad, "weight": weight.grad}


def compute(case: Case, rank: int, size: int, group: Any) -> Numbers:
    """The same by the functions under test; this rank's part of the weights and of the hidden states' gradient."""
    given = inputs(case)
    hidden, part = given["hidden"].requires_grad_(), given["weight"].chunk(size)[rank].clone().requires_grad_()
    target, buckets = vocab_parallel_bucket_log_probs(
        hidden, part, given["targets"], given["ids"], of=case.of, group=group
    )
    ((target * given["a"]).sum() + (buckets * given["b"]).sum()).backward()
    top, best = vocab_parallel_top_tokens(hidden, part, case.k, of=case.of, group=group)
    assert hidden.grad is not None and part.grad is not None and not best.requires_grad
    found = {"targets": target.detach(), "buckets": buckets.detach(), "top": top, "best": best}
    return found | {"hidden": hidden.grad, "weight": part.grad}


def check(case: Case, parts: list[Numbers]) -> None:
    """Every rank has the whole numbers, and its part of the gradients."""
    expected, tolerance = oracle(case), 1e-12 if case.dtype == torch.float64 else 2e-6
    for part in parts:
        assert torch.equal(part["top"], expected["top"])
        for name in ("targets", "buckets", "best"):
            close = 2e-6 if name == "best" else tolerance  # these are float32
            assert torch.equal(part[name], parts[0][name])
            torch.testing.assert_close(part[name].double(), expected[name], atol=close, rtol=0)
    grad_hidden = torch.stack([part["hidden"].double() for part in parts]).sum(0)
    torch.testing.assert_close(grad_hidden, expected["hidden"], atol=10 * tolerance, rtol=0)
    grad_weight = torch.cat([part["weight"] for part in parts]).double()
    torch.testing.assert_close(grad_weight, expected["weight"], atol=10 * tolerance, rtol=0)
    assert (grad_weight[VOCAB:] == 0).all()


PLAIN = Case()
CASES = {
    **{f"chunks of {n}": replace(PLAIN, of=replace(PLAIN.of, chunk_tokens=n)) for n in (1, 3, 100)},
    "one token": replace(PLAIN, k=1),
    "more than a shard has": replace(PLAIN, k=30),
    "all but one": replace(PLAIN, k=VOCAB - 1),
    "soft cap, temperature": replace(PLAIN, of=replace(PLAIN.of, soft_cap=2.5, temperature=0.7)),
    "no tokens": replace(PLAIN, tokens=0),
    "float64": replace(PLAIN, of=replace(PLAIN.of, soft_cap=3.0), dtype=torch.float64),
}


@pytest.mark.parametrize("name", CASES)
def test_a_whole_vocabulary(name: str) -> None:
    check(CASES[name], [compute(CASES[name], 0, 1, None)])


def split_case(rank: int, world_size: int, init_method: str, cases: list[Case]) -> list[Numbers]:
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


@pytest.mark.parametrize("world_size", [2, 4])  # at 2 the last rank holds some padding, at 4 nothing else
def test_a_split_vocabulary(ranks: RankPool, world_size: int) -> None:
    cases = list(CASES.values())
    by_rank = ranks.run(world_size, split_case, cases)
    for number, case in enumerate(cases):
        check(case, [found[number] for found in by_rank])
