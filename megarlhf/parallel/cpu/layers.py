"""RMSNorm, rotary positions and latent attention (DeepSeek-V2, arXiv:2405.04434 section 2.1) of local layers."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from megarlhf.parallel.cpu.segments import SegmentParams
from megarlhf.parallel.megatron_versions import LatentLayersAsNamed


class SegmentNorm(torch.nn.RMSNorm):
    """RMSNorm that works under sequence parallelism, which Megatron-Core's torch norm refuses.

    The mark on the weight tells Megatron-Core to sum its gradient over the tensor-parallel group.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.zero_centered = config.layernorm_zero_centered_gamma  # the factor is 1 + weight
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (no such attribute, to mypy)

    def forward(self, x: Tensor) -> Tensor:
        """x over its root mean square, times the weight."""
        if not self.zero_centered:
            return super().forward(x)
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).type_as(x)


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
        with_yarn = isinstance(self.whole, YarnRotaryEmbedding)
        first_two, *factor = self.whole.get_emb(2) if with_yarn else (self.whole.get_emb(2),)
        frequencies = first_two[1, 0, 0]  # of [2, 1, 1, head_dim], the angles of positions 0 and 1
        angles = positions[..., None].to(frequencies.dtype) * frequencies
        return (angles, *factor) if with_yarn else angles


def use_segment_positions(model: torch.nn.Module) -> None:
    """Let every rotary embedding of a model turn packed tokens by their own positions.

    GPTModel and the latent attention build theirs by name, so no layer spec can say which.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, RotaryEmbedding):
                setattr(module, name, SegmentRotaryEmbedding(child))


class WholeLinear(torch.nn.Module):
    """A matrix that every tensor-parallel rank holds whole and applies to its own part of the sequence."""

    def __init__(self, config: Any, input_size: int, output_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (no such attribute, to mypy)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """[t, 1, input_size] -> ([t, 1, output_size], no bias), as Megatron-Core's linear layers return them."""
        return self._forward_impl(hidden, self.weight), None

    def _forward_impl(self, input: Tensor, weight: Tensor, **_: Any) -> Tensor:
        """The product alone, by the name that it has in Megatron-Core's layers."""
        return F.linear(input, weight)


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
