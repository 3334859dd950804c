"""Multi-latent attention (DeepSeek-V2, arXiv:2405.04434 section 2.1) without TransformerEngine, laid out as with it."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from megarlhf.parallel.megatron_versions import LatentLayersAsNamed


class WholeLinear(torch.nn.Module):
    """A matrix that every tensor-parallel rank holds whole and applies to its own part of the sequence."""

    def __init__(self, config: Any, input_size: int, output_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (no such attribute, to mypy)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """[t, 1, input_size] -> ([t, 1, output_size], no bias), as Megatron-Core's linear layers return them."""
        return F.linear(hidden, self.weight), None


class SegmentLatentAttention(LatentLayersAsNamed, MLASelfAttention):
    """Latent attention whose down projections are whole on every rank.

    Megatron-Core's own layers without TransformerEngine cut them over tensor parallelism, and then the gradient of the
    rotary part of the keys, which all heads share, is not summed over the ranks.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(config, config.hidden_size, config.q_lora_rank)
        compressed = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = WholeLinear(config, config.hidden_size, compressed)
