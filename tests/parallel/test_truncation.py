"""Truncated distributions against loops in float64, one token at a time, values and gradients."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.parallel.groups import ParallelSizes, destroy_groups, initialize_groups
from megarlhf.parallel.truncation import Truncation, smallest_kept
from megarlhf.parallel.vocab import OutputDistribution, vocab_parallel_kept_tokens, vocab_parallel_log_probs
from tests.distributed.pool import RankPool
from tests.parallel.test_vocab import VOCAB, Case, inputs

WHOLE = OutputDistribution(vocab_size=VOCAB, chunk_tokens=3, temperature=0.8)
TRUNCATIONS = {
    "top-p": Truncation(top_p=0.9),
    "small top-p": Truncation(top_p=0.05),  # the likeliest token alone
    "top-k": Truncation(top_k=5),
    "top-k of all": Truncation(top_k=VOCAB),
    "min-p": Truncation(min_p=0.05),
    "all": Truncation(top_p=0.7, top_k=20, min_p=0.02),
}
CASES = {
    **{name: Case(replace(WHOLE, truncation=of), tokens=23) for name, of in TRUNCATIONS.items()},
    "soft cap": Case(replace(WHOLE, soft_cap=2.5, truncation=TRUNCATIONS["all"]), tokens=23),
    "entropy as a metric": Case(replace(WHOLE, truncation=TRUNCATIONS["all"]), entropy="metric"),
    "one chunk": Case(replace(WHOLE, chunk_tokens=100, truncation=TRUNCATIONS["all"])),
    "no tokens": Case(replace(WHOLE, truncation=TRUNCATIONS["all"]), tokens=0),
}


def kept(logits: list[float], of: Truncation) -> set[int]:
    """By the rules of vLLM's sampler, which sorts and adds up."""
    largest = max(logits)
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    order = [token for token in order if math.exp(logits[token] - largest) >= of.min_p]
    order = order[: of.top_k]
    weights = [math.exp(logits[token] - largest) for token in order]
    before = 0.0
    for place, weight in enumerate(weights):
        if before >= of.top_p * sum(weights):
            return set(order[:place])
        before += weight
    return set(order)


def logits_of(case: Case, hidden: Tensor, weight: Tensor) -> Tensor:
    logits = hidden @ weight[:VOCAB].t()
    if case.of.soft_cap is not None:
        logits = case.of.soft_cap * torch.tanh(logits / case.of.soft_cap)
    return logits / case.of.temperature


def oracle(case: Case, *, masks: Tensor | None = None) -> dict[str, Tensor]:
    """Log-probs, entropy and gradients over the kept tokens and the target; `masks`: over these tokens instead."""
    hidden, weight, targets, a, b = inputs(case)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = logits_of(case, hidden, weight)
    if masks is None:
        masks = torch.zeros(len(logits), VOCAB, dtype=torch.bool)
        for row, values in enumerate(logits.tolist()):
            masks[row, list(kept(values, case.of.truncation))] = True
    masks = masks.scatter(-1, targets[:, None], True)
    log_probs, entropies = [], []
    for row, mask, target in zip(logits, masks, targets.tolist(), strict=True):
        chosen = row[mask].log_softmax(-1)
        log_probs.append(chosen[int(mask[:target].sum())])
        entropies.append(-(chosen.exp() * chosen).sum())
    found = torch.stack([torch.stack(log_probs), torch.stack(entropies)]) if log_probs else logits.new_zeros(2, 0)
    loss = (found[0] * a).sum() + ((found[1] * b).sum() if case.entropy == "loss" else 0.0)
    if log_probs:
        loss.backward()
    else:
        hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    return {
        **{"log_probs": found[0].detach(), "entropy": found[1].detach(), "masks": masks},
        **{"hidden": hidden.grad, "weight": weight.grad},
    }


def compute(case: Case, rank: int, size: int, group: Any, *, sampled_by: float | None = None) -> dict[str, Tensor]:
    """By the functions under test; this rank's parts.

    Args:
        sampled_by: the kept tokens are those of weights that are larger by this factor, as before an update.
    """
    hidden, weight, targets, a, b = inputs(case)
    part = weight.chunk(size)[rank].clone()
    tokens = None
    if sampled_by is not None:
        tokens = vocab_parallel_kept_tokens(hidden, part * sampled_by, of=case.of, group=group)
    part.requires_grad_()
    hidden.requires_grad_()
    log_probs, entropy = vocab_parallel_log_probs(
        hidden, part, targets, of=case.of, entropy=case.entropy, kept=tokens, group=group
    )
    assert entropy is not None
    loss = (log_probs * a).sum() + ((entropy * b).sum() if case.entropy == "loss" else 0.0)
    loss.backward()
    assert hidden.grad is not None and part.grad is not None
    found = {"log_probs": log_probs.detach(), "entropy": entropy.detach(), "hidden": hidden.grad, "weight": part.grad}
    return found if tokens is None else found | {"tokens": tokens}


def check(case: Case, parts: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    for part in parts:
        for name in ("log_probs", "entropy"):
            assert torch.equal(part[name], parts[0][name])
            torch.testing.assert_close(part[name].double(), expected[name], atol=3e-6, rtol=0)
    grad_hidden = torch.stack([part["hidden"].double() for part in parts]).sum(0)
    torch.testing.assert_close(grad_hidden, expected["hidden"], atol=1e-5, rtol=0)
    grad_weight = torch.cat([part["weight"] for part in parts])
    torch.testing.assert_close(grad_weight.double(), expected["weight"], atol=1e-5, rtol=0)


LATER = Case(replace(WHOLE, truncation=TRUNCATIONS["all"]), tokens=23)


def later_oracle() -> dict[str, Tensor]:
    """Over the tokens that weights of half the size keep."""
    hidden, weight, _, _, _ = inputs(LATER)
    logits = logits_of(LATER, hidden.double(), 0.5 * weight.double())
    masks = torch.zeros(len(logits), VOCAB, dtype=torch.bool)
    for row, values in enumerate(logits.tolist()):
        masks[row, list(kept(values, LATER.of.truncation))] = True
    return oracle(LATER, masks=masks) | {"kept": masks}


def check_later(parts: list[dict[str, Tensor]]) -> None:
    expected = later_oracle()
    check(LATER, parts, expected)
    counts = sum((part["tokens"] >= 0).sum(-1) for part in parts)
    assert torch.equal(torch.as_tensor(counts), expected["kept"].sum(-1))
    assert not torch.equal(expected["masks"], oracle(LATER)["masks"]), "the present weights keep others"


def split_case(rank: int, world_size: int, init_method: str) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Over a split vocabulary."""
    from megatron.core import parallel_state

    initialize_groups(
        ParallelSizes(tensor=world_size), rank=rank, world_size=world_size, init_method=init_method, seed=1
    )
    try:
        group = parallel_state.get_tensor_model_parallel_group()
        found = [compute(case, rank, world_size, group) for case in CASES.values()]
        return found, compute(LATER, rank, world_size, group, sampled_by=0.5)
    finally:
        destroy_groups()


@pytest.mark.parametrize("name", CASES)
def test_a_whole_vocabulary(name: str) -> None:
    case = CASES[name]
    expected = oracle(case)
    check(case, [compute(case, 0, 1, None)], expected)
    if name in ("top-p", "top-k", "min-p", "all"):
        assert 1 < float(expected["masks"].sum(-1).double().mean()) < VOCAB - 3
        assert float(expected["masks"].gather(-1, inputs(case)[2][:, None]).sum()) == 23


@pytest.mark.parametrize("world_size", [2, 4])  # at 4 the last rank holds padding only
def test_a_split_vocabulary(ranks: RankPool, world_size: int) -> None:
    by_rank = ranks.run(world_size, split_case)
    for number, case in enumerate(CASES.values()):
        check(case, [found[number] for found, _ in by_rank], oracle(case))
    check_later([later for _, later in by_rank])


def test_kept_tokens_stay_those_of_the_weights_that_sampled() -> None:
    check_later([compute(LATER, 0, 1, None, sampled_by=0.5)])


def test_large_vocabularies_of_every_shape() -> None:
    """Flat, peaked and with ties; thresholds are exact, so that no token on the edge is lost."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.cat(
        [
            scale * torch.randn(4, 3000, generator=generator) + shift
            for scale, shift in ((1e-3, 0.0), (1.0, 50.0), (6.0, -20.0))
        ]
    )
    scores[0, :] = 1.0
    scores[5, :7] = 60.0  # seven that are equally likely, and likeliest
    for of in (Truncation(top_p=0.9), Truncation(top_p=0.999), Truncation(top_p=0.3, top_k=700), Truncation(min_p=0.5)):
        found = smallest_kept(scores, of, 3000, None)
        for row, least in zip(scores, found.tolist(), strict=True):
            chosen = kept(row.tolist(), of)
            assert set((row >= least).nonzero()[:, 0].tolist()) == _with_ties(row.tolist(), chosen), of


def _with_ties(scores: list[float], chosen: set[int]) -> set[int]:
    """With all tokens that are as likely as the last one that is chosen."""
    last = min(scores[token] for token in chosen)
    return {token for token, score in enumerate(scores) if score >= last}
