"""Divergence of two vocabulary-parallel output layers against torch's own softmax in float64, values and gradients."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.parallel import vocab
from megarlhf.parallel.distillation import Direction, TeacherLayer, vocab_parallel_distillation
from megarlhf.parallel.groups import ParallelSizes, destroy_groups, initialize_groups
from megarlhf.parallel.vocab import OutputDistribution
from tests.distributed.pool import RankPool

HIDDEN, TEACHER_HIDDEN, VOCAB, PADDED = 5, 8, 37, 48


@dataclass(frozen=True)
class Case:
    """One computation."""

    of: OutputDistribution = OutputDistribution(vocab_size=VOCAB, chunk_tokens=3)
    teacher: OutputDistribution = OutputDistribution(vocab_size=VOCAB, chunk_tokens=3)
    direction: Direction = "forward"
    scale: float = 0.7  # of the weights
    dtype: torch.dtype = torch.float32
    tokens: int = 7
    frozen: bool = False


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(case: Case) -> Inputs:
    """Of the student and the teacher hidden states and weights with padding rows; targets, and the loss's weights."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.tokens, HIDDEN, generator=generator)
    other = torch.randn(case.tokens, TEACHER_HIDDEN, generator=generator)
    weight = case.scale * torch.randn(PADDED, HIDDEN, generator=generator)
    teacher = case.scale * torch.randn(PADDED, TEACHER_HIDDEN, generator=generator)
    weight[VOCAB:] = teacher[VOCAB:] = 20.0  # padding must not count, however large
    targets = torch.randint(0, VOCAB, (case.tokens,), generator=generator)
    a, b = torch.randn(2, case.tokens, generator=generator)
    kept = (hidden, weight, other, teacher)
    return (*(tensor.to(case.dtype) for tensor in kept), targets, a, b)  # type: ignore[return-value]


def log_softmax(hidden: Tensor, weight: Tensor, of: OutputDistribution) -> Tensor:
    logits = hidden.double() @ weight[:VOCAB].double().t()
    if of.soft_cap is not None:
        logits = of.soft_cap * torch.tanh(logits / of.soft_cap)
    return (logits / of.temperature).log_softmax(-1)


def oracle(case: Case, given: Inputs) -> dict[str, Tensor]:
    """All of it the plain way, in float64."""
    hidden, weight, other, teacher, targets, a, b = given
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    p, q = log_softmax(hidden, weight, case.of), log_softmax(other, teacher, case.teacher)
    divergence = (q.exp() * (q - p)).sum(-1) if case.direction == "forward" else (p.exp() * (p - q)).sum(-1)
    log_probs = p.gather(-1, targets[:, None])[:, 0]
    ((log_probs * a).sum() + (divergence * b).sum()).backward()
    found = {"log_probs": log_probs, "divergence": divergence, "entropy": -(q.exp() * q).sum(-1)}
    assert hidden.grad is not None and weight.grad is not None
    return {name: tensor.detach() for name, tensor in found.items()} | {"hidden": hidden.grad, "weight": weight.grad}


def compute(case: Case, given: Inputs, rank: int, size: int, group: Any) -> dict[str, Tensor]:
    """The same by the function under test; this rank's part of the weights and of the hidden states' gradient."""
    hidden, weight, other, teacher, targets, a, b = given
    hidden = hidden.clone().requires_grad_()
    part = weight.chunk(size)[rank].clone().requires_grad_(not case.frozen)
    layer = TeacherLayer(hidden=other, weight=teacher.chunk(size)[rank].clone(), of=case.teacher)
    log_probs, divergence, entropy = vocab_parallel_distillation(
        hidden, part, targets, of=case.of, teacher=layer, direction=case.direction, group=group
    )
    assert not entropy.requires_grad
    ((log_probs * a).sum() + (divergence * b).sum()).backward()
    found = {"log_probs": log_probs.detach(), "divergence": divergence.detach(), "entropy": entropy}
    assert hidden.grad is not None and (part.grad is None) == case.frozen
    return found | {"hidden": hidden.grad} | ({} if part.grad is None else {"weight": part.grad})


def check(case: Case, given: Inputs, parts: list[dict[str, Tensor]]) -> None:
    """Every rank has the whole numbers, and its part of the gradients."""
    tolerance = 1e-13 if case.dtype == torch.float64 else 2e-6 if case.scale < 1 else 2e-5  # logits of 50: 4e-6 each
    expected = oracle(case, given)
    for part in parts:
        for name in ("log_probs", "divergence", "entropy"):
            assert torch.equal(part[name], parts[0][name])
            torch.testing.assert_close(part[name].double(), expected[name], atol=tolerance, rtol=tolerance)
        assert (part["divergence"] >= -tolerance).all()
    grad_hidden = torch.stack([part["hidden"].double() for part in parts]).sum(0)
    torch.testing.assert_close(grad_hidden, expected["hidden"], atol=5 * tolerance, rtol=tolerance)
    if not case.frozen:
        grad_weight = torch.cat([part["weight"] for part in parts]).double()
        torch.testing.assert_close(grad_weight, expected["weight"], atol=5 * tolerance, rtol=tolerance)
        assert (grad_weight[VOCAB:] == 0).all()


PLAIN = Case()
OTHERS = {
    **{f"chunks of {n}": replace(PLAIN, of=replace(PLAIN.of, chunk_tokens=n)) for n in (1, 2, 7, 100)},
    "soft caps": replace(PLAIN, of=replace(PLAIN.of, soft_cap=2.5), teacher=replace(PLAIN.teacher, soft_cap=1.5)),
    "temperature": replace(PLAIN, of=replace(PLAIN.of, temperature=0.7, soft_cap=3.0)),
    "sharp": replace(PLAIN, scale=4.0),
    "no tokens": replace(PLAIN, tokens=0),
    "frozen": replace(PLAIN, frozen=True),
    "float64": replace(PLAIN, of=replace(PLAIN.of, soft_cap=3.0, temperature=0.8), dtype=torch.float64),
}
CASES = {
    f"{name}, {direction}": replace(case, direction=direction)
    for name, case in OTHERS.items()
    for direction in ("forward", "reverse")
}


@pytest.mark.parametrize("name", CASES)
def test_a_whole_vocabulary(name: str) -> None:
    case, given = CASES[name], inputs(CASES[name])
    check(case, given, [compute(case, given, 0, 1, None)])


def split_case(rank: int, world_size: int, init_method: str, cases: list[Case]) -> list[dict[str, Tensor]]:
    """Over a split vocabulary."""
    from megatron.core import parallel_state

    initialize_groups(
        ParallelSizes(tensor=world_size), rank=rank, world_size=world_size, init_method=init_method, seed=1
    )
    try:
        group = parallel_state.get_tensor_model_parallel_group()
        return [compute(case, inputs(case), rank, world_size, group) for case in cases]
    finally:
        destroy_groups()


@pytest.mark.parametrize("world_size", [2, 4])  # at 2 the last rank holds some padding, at 4 nothing else
def test_a_split_vocabulary(ranks: RankPool, world_size: int) -> None:
    cases = list(CASES.values())
    by_rank = ranks.run(world_size, split_case, cases)
    for number, case in enumerate(cases):
        check(case, inputs(case), [found[number] for found in by_rank])


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(direction: Direction) -> None:
    case = replace(PLAIN, direction=direction)
    hidden, weight, _, _, targets, a, b = inputs(case)
    found = compute(case, (hidden, weight, hidden, weight, targets, 0 * a, b), 0, 1, None)
    assert not found["divergence"].any() and found["entropy"].min() > 0.5
    assert found["hidden"].abs().max() < 1e-7 and found["weight"].abs().max() < 1e-7


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_bfloat16_weights(direction: Direction) -> None:
    """Logits and their gradients are rounded to bfloat16, sums are not."""
    case = replace(PLAIN, dtype=torch.bfloat16, direction=direction)
    given = inputs(case)
    found, expected = compute(case, given, 0, 1, None), oracle(case, given)
    for name, tolerance in (("divergence", 0.05), ("hidden", 0.06), ("weight", 0.06)):
        torch.testing.assert_close(found[name].double(), expected[name], atol=tolerance, rtol=0.02)


def test_products_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of each at once; every chunk but the last is computed again for the gradient, none without one."""
    sizes: list[tuple[int, int]] = []
    scores = vocab.OutputShard.scores

    def watch(self: Any, hidden: Tensor, rows: Tensor, buffer: Tensor) -> Tensor:
        sizes.append((len(hidden), hidden.shape[1]))
        assert len(buffer) == 3
        return scores(self, hidden, rows, buffer)

    monkeypatch.setattr(vocab.OutputShard, "scores", watch)
    given = inputs(PLAIN)
    compute(PLAIN, given, 0, 1, None)
    assert sizes == [(n, width) for n in (3, 3, 1, 3, 3) for width in (HIDDEN, TEACHER_HIDDEN)]
    sizes.clear()
    with torch.no_grad():
        hidden, weight, other, teacher, targets, _, _ = given
        layer = TeacherLayer(hidden=other, weight=teacher, of=PLAIN.teacher)
        vocab_parallel_distillation(hidden, weight, targets, of=PLAIN.of, teacher=layer, direction="forward")
    assert sizes == [(n, width) for n in (3, 3, 1) for width in (HIDDEN, TEACHER_HIDDEN)]
