"""Which keys a packed token sees through a window, by hand, and soft-capped attention by its definition."""

import math

import pytest
import torch

from megarlhf.parallel.cpu import segments
from megarlhf.parallel.cpu.ring import Scoring
from megarlhf.parallel.cpu.segments import SegmentParams, attention_blocks, take_spans


def test_a_window_counts_back_within_the_segment() -> None:
    """Segments of 4 and 2 tokens; with a window of 2 each sees itself and the one before."""
    (block,) = attention_blocks(torch.tensor([0, 4, 6]), (None, None), torch.tensor([0, 1, 2, 3, 0, 1]))
    seen = block.visible(2)
    assert seen is not None
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def test_a_window_reaches_back_into_the_shared_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 3 tokens, then two responses of 2 that continue it; a window of 3; blocks of at most 4 queries."""
    monkeypatch.setattr(segments, "_BLOCK_TOKENS", 4)
    prompt, responses = attention_blocks(torch.tensor([0, 3, 5, 7]), (None, 0, 0), torch.tensor([0, 1, 2, 3, 4, 3, 4]))
    alone, shared = prompt.visible(3), responses.visible(3)
    assert alone is not None and alone.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert shared is not None
    assert shared.int().tolist() == [
        [0, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 1, 1],
    ]


def test_short_prompts_and_what_continues_them_share_a_block() -> None:
    """A sequence alone, then a prompt of 2 with responses of 1 and 2: one block, and its mask as of the parts."""
    (block,) = attention_blocks(torch.tensor([0, 1, 3, 4, 6]), (None, None, 1, 1), torch.tensor([0, 0, 1, 2, 2, 3]))
    assert (block.start, block.stop, block.prefix) == (0, 6, None)
    assert block.mask is not None
    assert block.mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 1, 0],
        [0, 1, 1, 0, 1, 1],
    ]
    near = block.visible(2)
    assert near is not None and near[4].tolist() == [False, False, True, False, True, False]


def test_a_prompt_and_its_responses_are_not_parted_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of at most 6 queries: 4 tokens alone, then a prompt and a response of 3 together, which fit the next."""
    monkeypatch.setattr(segments, "_BLOCK_TOKENS", 6)
    blocks = attention_blocks(torch.tensor([0, 4, 6, 7, 12]), (None, None, 1, None), torch.arange(12))
    assert [(block.start, block.stop, block.prefix) for block in blocks] == [(0, 4, None), (4, 7, None), (7, 12, None)]


def test_spans_are_taken_with_the_gradient_of_slices() -> None:
    """Two lists that overlap in columns 2 and 3, and leave column 6 out."""
    tensor = torch.arange(14.0).reshape(1, 1, 7, 2).requires_grad_()
    first, second = take_spans(tensor, [[(0, 4)], [(2, 4), (5, 6)]])
    assert torch.equal(first, tensor[:, :, :4]) and torch.equal(second, tensor[:, :, [2, 3, 5]])
    (first.sum() + 10 * second.sum()).backward()
    assert tensor.grad is not None and tensor.grad[0, 0, :, 0].tolist() == [1, 1, 11, 11, 0, 10, 0]


def test_layers_with_one_window_share_their_masks() -> None:
    blocks = attention_blocks(torch.tensor([0, 4, 6]), (None, None), torch.tensor([0, 1, 2, 3, 0, 1]))
    params = SegmentParams(qkv_format="sbhd", blocks=blocks)
    assert params.masks(2)[0] is params.masks(2)[0]
    assert params.masks(None)[0] is blocks[0].mask


def test_a_soft_cap_bends_scores_before_the_softmax() -> None:
    """One query, two keys: scores 4 and 0 under a cap of 2 become 2 tanh(2) and 0."""
    query, value = torch.tensor([[2.0]]), torch.tensor([[1.0], [0.0]])
    key = torch.tensor([[2.0], [0.0]])
    found = Scoring(scale=1.0, soft_cap=2.0).attend(query, key, value, torch.ones(1, 2, dtype=torch.bool))
    bent = math.exp(2 * math.tanh(2))
    torch.testing.assert_close(found, torch.tensor([[bent / (bent + 1)]]))
