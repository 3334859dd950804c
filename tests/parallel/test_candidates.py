"""Logits of named tokens and the likeliest of all, over a split vocabulary, against plain float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.parallel.candidates import candidate_logits, likeliest_tokens
from megarlhf.parallel.groups import ParallelSizes, destroy_groups, initialize_groups
from megarlhf.parallel.vocab import OutputDistribution
from tests.distributed.pool import RankPool

HIDDEN, VOCAB, PADDED = 5, 37, 48
PLAIN = OutputDistribution(vocab_size=VOCAB, chunk_tokens=3)
CASES = {
    "plain": (PLAIN, 7),
    "temperature and soft cap": (replace(PLAIN, temperature=0.6, soft_cap=2.5), 7),
    "no positions": (PLAIN, 0),
}
CANDIDATES = [36, 2, 23, 24]  # of both halves of the padded vocabulary, and at their border


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weights whose padding is larger than all else, and what the loss multiplies each logit by."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    weight[VOCAB:] = 50.0
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    return hidden, weight, torch.randn(tokens, len(CANDIDATES), generator=generator)


def compute(name: str, rank: int, size: int, group: Any) -> dict[str, Tensor]:
    of, tokens = CASES[name]
    hidden, weight, factors = inputs(tokens)
    part = weight.chunk(size)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    logits = candidate_logits(hidden, part, torch.tensor(CANDIDATES), of=of, group=group)
    (logits.log_softmax(-1) * factors).sum().backward()
    likeliest = likeliest_tokens(hidden, part, of=of, group=group)
    assert not likeliest.requires_grad and hidden.grad is not None and part.grad is not None
    return {"logits": logits.detach(), "likeliest": likeliest, "hidden": hidden.grad, "weight": part.grad}


def split_case(rank: int, world_size: int, init_method: str) -> list[dict[str, Tensor]]:
    from megatron.core import parallel_state

    initialize_groups(
        ParallelSizes(tensor=world_size), rank=rank, world_size=world_size, init_method=init_method, seed=1
    )
    try:
        group = parallel_state.get_tensor_model_parallel_group()
        return [compute(name, rank, world_size, group) for name in CASES]
    finally:
        destroy_groups()


def check(name: str, parts: list[dict[str, Tensor]]) -> None:
    of, tokens = CASES[name]
    hidden, weight, factors = (tensor.double() for tensor in inputs(tokens))
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = hidden @ weight[:VOCAB].t()
    if of.soft_cap is not None:
        logits = of.soft_cap * torch.tanh(logits / of.soft_cap)
    chosen = (logits / of.temperature)[:, CANDIDATES]
    (chosen.log_softmax(-1) * factors).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and weight.grad is not None
    for part in parts:
        torch.testing.assert_close(part["logits"].double(), chosen.detach(), atol=3e-6, rtol=0)
        assert part["likeliest"].tolist() == logits.argmax(-1).tolist()
    found = torch.stack([part["hidden"] for part in parts]).sum(0)
    torch.testing.assert_close(found.double(), hidden.grad, atol=1e-5, rtol=0)
    found = torch.cat([part["weight"] for part in parts])
    torch.testing.assert_close(found.double(), weight.grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_whole_vocabulary(name: str) -> None:
    check(name, [compute(name, 0, 1, None)])


def test_split_vocabulary(ranks: RankPool) -> None:
    """In quarters, of which the last is padding alone."""
    results = ranks.run(4, split_case)
    for place, name in enumerate(CASES):
        check(name, [found[place] for found in results])


def test_the_first_of_equal_tokens_is_the_likeliest() -> None:
    weight = torch.tensor([[0.0], [1.0], [1.0]])
    assert likeliest_tokens(torch.ones(1, 1), weight, of=replace(PLAIN, vocab_size=3)).tolist() == [1]
