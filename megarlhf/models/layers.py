"""Layers that Megatron-Core lacks, built of its own through the layer spec, and what is added around a GPTModel."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megarlhf.models.arch import Additions


class NormedLinear(MegatronModule):
    """A linear layer and the RMSNorm of what it gives (the norm after attention or the feed-forward part).

    `linear` and `norm` are the backend's classes of them.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, linear: type, norm: type, **options: Any
    ) -> None:
        super().__init__(config=config)
        self.linear = linear(input_size, output_size, config=config, **options)
        self.norm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """[t, 1, input_size / tp] -> ([t, 1, output_size], bias to add later)."""
        output, bias = self.linear(hidden)
        return self.norm(output), bias


class TwoRopeAttention(SelfAttention):
    """Self-attention whose layers with a window have a RoPE base of their own, `window_rope_theta`."""

    def __init__(self, *, config: Any, layer_number: int, window_rope_theta: float, **options: Any) -> None:
        super().__init__(config=config, layer_number=layer_number, **options)
        self.window_rope = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window_rope = RotaryEmbedding(
                config.kv_channels,
                rotary_percent=1.0,
                rotary_base=window_rope_theta,
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=self.pg_collection.cp,
            )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Any:
        """As SelfAttention's; `rotary_pos_emb` is of the layers without a window."""
        if self.window_rope is not None:
            length = self.window_rope.get_rotary_seq_len(None, None, hidden_states, self.config, packed_seq_params)
            rotary_pos_emb = self.window_rope(length, packed_seq=True)
        return super().forward(
            hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params, **kwargs
        )


class FixedBiasRouter(TopKRouter):
    """A router whose expert bias stays in float32 when the model is cast; Megatron-Core rounds it and casts it back."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedBiasRouter":
        exact: Tensor = self.get_buffer("expert_bias")
        super()._apply(fn, recurse)
        self.register_buffer("expert_bias", exact.to(self.get_buffer("expert_bias").device))
        return self


def add_around(chunk: Any, additions: Additions) -> None:
    """Scale the embedding of a chunk of the model, where it has one."""
    if additions.embedding_scale != 1.0 and chunk.pre_process:
        # The scale is rounded to the model's dtype, as in the training of the published weights.
        scale = torch.tensor(additions.embedding_scale, dtype=torch.float64)
        chunk.embedding.register_forward_hook(lambda _, inputs, output: output * scale.to(output))
