"""Rotary position embeddings of packed tokens for local layers, around Megatron-Core's."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from torch import Tensor

from megarlhf.parallel.cpu.segments import SegmentParams


class SegmentRotaryEmbedding(torch.nn.Module):
    """Rotary angles of each packed token's own position, with the frequencies of an embedding of Megatron-Core's.

    Megatron-Core asks for a sequence length and hands it to forward(); here that "length" is the positions themselves,
    which is how they reach forward() without state.
    """

    def __init__(self, whole: RotaryEmbedding) -> None:
        super().__init__()
        self.whole = whole

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> Tensor:
        """Positions [t, 1, 1] of a packed sequence, [t, 1] for latent attention."""
        params: SegmentParams = args[4] if len(args) > 4 else kwargs["packed_seq_params"]
        assert params.position_ids is not None
        positions = params.position_ids[:, None]
        return positions if args[3].multi_latent_attention else positions[:, None]

    def forward(self, positions: Tensor, packed_seq: bool = False, cp_group: Any = None) -> Any:
        """Angles for positions, with head_dim as one more dimension; with YaRN also its factor on cosine and sine."""
        first_two = self.whole.get_emb(2)  # [2, 1, 1, head_dim] of positions 0 and 1
        if isinstance(self.whole, YarnRotaryEmbedding):
            angles, factor = first_two
            return _angles(positions, angles), factor
        return _angles(positions, first_two)


def _angles(positions: Tensor, first_two: Tensor) -> Tensor:
    frequencies = first_two[1, 0, 0]
    return positions[..., None].to(frequencies.dtype) * frequencies


def use_segment_positions(model: torch.nn.Module) -> None:
    """Let every rotary embedding of a model turn packed tokens by their own positions.

    GPTModel and the latent attention build theirs by name, so no layer spec can say which.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, RotaryEmbedding):
                setattr(module, name, SegmentRotaryEmbedding(child))
