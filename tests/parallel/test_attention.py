"""Which keys a packed token sees through a window, by hand, and soft-capped attention by its definition."""

import math

import torch

from megarlhf.parallel.cpu.ring import Scoring
from megarlhf.parallel.cpu.segments import SegmentParams, attention_blocks


def test_a_window_counts_back_within_the_segment() -> None:
    """Segments of 4 and 2 tokens; with a window of 2 each sees itself and the one before."""
    (block,) = attention_blocks([0, 4, 6], (None, None), torch.tensor([0, 1, 2, 3, 0, 1]))
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


def test_a_window_reaches_back_into_the_shared_prompt() -> None:
    """A prompt of 3 tokens, then two responses of 2 that continue it; a window of 3."""
    prompt, responses = attention_blocks([0, 3, 5, 7], (None, 0, 0), torch.tensor([0, 1, 2, 3, 4, 3, 4]))
    alone, shared = prompt.visible(3), responses.visible(3)
    assert alone is not None and alone.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert shared is not None
    assert shared.int().tolist() == [
        [0, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 1, 1],
    ]


def test_layers_with_one_window_share_their_masks() -> None:
    blocks = attention_blocks([0, 4, 6], (None, None), torch.tensor([0, 1, 2, 3, 0, 1]))
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
