"""Rotary position embeddings of packed tokens for local layers, in place of Megatron-Core's."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from torch import Tensor

from megarlhf.parallel.cpu.segments import SegmentParams


class SegmentRotaryEmbedding(RotaryEmbedding):
    """Rotary angles of each packed token's own position.

    Megatron-Core asks for a sequence length and hands it to forward(); here that "length" is the positions themselves,
    which is how they reach forward() without state. Plain packed parameters keep Megatron-Core's behaviour.
    """

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> Any:
        """Positions [t, 1, 1] of segment parameters, [t, 1] for latent attention; else Megatron-Core's own length."""
        params = args[4] if len(args) > 4 else kwargs.get("packed_seq_params")
        if not isinstance(params, SegmentParams):
            return super().get_rotary_seq_len(*args, **kwargs)
        assert params.position_ids is not None
        positions = params.position_ids[:, None]
        return positions if args[3].multi_latent_attention else positions[:, None]

    def forward(self, max_seq_len: Any, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Any:
        """Angles for positions, with head_dim as one more dimension."""
        if not torch.is_tensor(max_seq_len):
            return super().forward(max_seq_len, offset=offset, packed_seq=packed_seq, cp_group=cp_group)
        return _angles(max_seq_len, self.get_emb(2))


class SegmentYarnRotaryEmbedding(SegmentRotaryEmbedding, YarnRotaryEmbedding):
    """The same with YaRN's frequencies."""

    def forward(self, max_seq_len: Any, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Any:
        """Angles for positions, and YaRN's factor on their cosine and sine."""
        angles, factor = self.get_emb(2)
        return _angles(max_seq_len, angles), factor


def _angles(positions: Tensor, first_two: Tensor) -> Tensor:
    """Angles for positions, given those [2, 1, 1, head_dim] of positions 0 and 1."""
    frequencies = first_two[1, 0, 0]
    return positions[..., None].to(frequencies.dtype) * frequencies


def use_segment_positions(model: torch.nn.Module) -> None:
    """Let every rotary embedding of a model turn packed tokens by their own positions."""
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            yarn = isinstance(module, YarnRotaryEmbedding)
            module.__class__ = SegmentYarnRotaryEmbedding if yarn else SegmentRotaryEmbedding
