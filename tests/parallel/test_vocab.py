"""Vocabulary-parallel log-probs and entropy against torch's own log_softmax, values and gradients."""

import pytest
import torch

from megarlhf.algos.losses import entropy_from_logits
from megarlhf.parallel.groups import ParallelSizes, destroy_groups, initialize_groups
from megarlhf.parallel.vocab import vocab_parallel_log_probs
from tests.distributed.pool import RankPool

TOKENS, VOCAB, PADDED = 7, 37, 48


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits with padding columns, targets, and weights of both outputs."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(TOKENS, PADDED, generator=generator)
    logits[:, VOCAB:] = 50.0  # padding must not count, however large
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return logits, targets, torch.randn(TOKENS, generator=generator), torch.randn(TOKENS, generator=generator)


def oracle(temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, entropy and the gradient of their weighted sum, the plain way in float64."""
    logits, targets, a, b = inputs()
    leaf = logits.double().requires_grad_()
    scaled = leaf[:, :VOCAB] / temperature
    log_probs = scaled.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    entropy = entropy_from_logits(scaled)
    (log_probs * a + entropy * b).sum().backward()
    return log_probs.detach(), entropy.detach(), leaf.grad


def split_case(rank: int, world_size: int, init_method: str, temperature: float) -> tuple[torch.Tensor, ...]:
    """The same over a split vocabulary."""
    from megatron.core import parallel_state

    initialize_groups(
        ParallelSizes(tensor=world_size), rank=rank, world_size=world_size, init_method=init_method, seed=1
    )
    try:
        logits, targets, a, b = inputs()
        leaf = logits.chunk(world_size, -1)[rank].clone().requires_grad_()
        log_probs, entropy = vocab_parallel_log_probs(
            leaf * 1.0,
            targets,
            vocab_size=VOCAB,
            temperature=temperature,
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        (log_probs * a + entropy * b).sum().backward()
        return log_probs.detach(), entropy.detach(), leaf.grad
    finally:
        destroy_groups()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("world_size", [1, 2, 4])  # at 4 the last rank holds padding only
def test_split_vocabulary_equals_whole(ranks: RankPool, world_size: int, temperature: float) -> None:
    log_probs, entropy, grad = oracle(temperature)
    results = ranks.run(world_size, split_case, temperature)
    for found_log_probs, found_entropy, _ in results:
        torch.testing.assert_close(found_log_probs.double(), log_probs, atol=2e-6, rtol=0)
        torch.testing.assert_close(found_entropy.double(), entropy, atol=2e-6, rtol=0)
    found_grad = torch.cat([result[2] for result in results], -1)
    torch.testing.assert_close(found_grad.double(), grad, atol=2e-6, rtol=0)
    assert (found_grad[:, VOCAB:] == 0).all()


def test_log_probs_alone_have_their_gradient() -> None:
    logits, targets, a, _ = inputs()
    leaf = logits[:, :VOCAB].clone().requires_grad_()
    log_probs, _ = vocab_parallel_log_probs(leaf, targets, vocab_size=VOCAB)
    (log_probs * a).sum().backward()
    other = logits[:, :VOCAB].clone().requires_grad_()
    (other.log_softmax(-1).gather(-1, targets[:, None])[:, 0] * a).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, atol=1e-6, rtol=0)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, targets, _, _ = inputs()
    rounded = logits[:, :VOCAB].bfloat16()
    log_probs, _ = vocab_parallel_log_probs(rounded, targets, vocab_size=VOCAB)
    expected = rounded.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), expected, atol=2e-6, rtol=0)
