"""Core attention of local layers: torch's scaled dot product over packed segments and shared prompts.

Megatron-Core's own local attention knows neither; `SegmentAttention` is put in its place through the layer spec.
"""

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megarlhf.parallel.cpu.ring import RingAttention, Scoring
from megarlhf.parallel.cpu.segments import SegmentParams, take_spans


class SegmentAttention(MegatronModule):
    """Core attention over packed segments, as torch's scaled dot product, block by block.

    Takes and gives Megatron-Core's [t, 1, heads / tp, head_dim] layout; grouped queries are expanded by torch. Under
    context parallelism keys and values are gathered from the group (cp_comm_type "all_gather"), or travel around it
    while each rank adds up what it has seen ("p2p").
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        soft_cap: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scoring = Scoring(scale=softmax_scale or 1.0 / math.sqrt(config.kv_channels), soft_cap=soft_cap)
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None  # Megatron-Core counts the tokens before
        self.context_group = parallel_state.get_context_parallel_group()
        self.travels = cp_comm_type != "all_gather" and self.context_group.size() > 1

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SegmentParams | None = None,
    ) -> Tensor:
        """[t, 1, h, d] queries and [t, 1, g, d] keys and values -> [t, 1, h * d]; values may have another d.

        Latent attention leaves out the dimension of 1.
        """
        assert packed_seq_params is not None, "the engine always packs"
        if query.dim() == 3:
            query, key, value = query[:, None], key[:, None], value[:, None]
        tokens, size = query.shape[0], self.context_group.size()
        blocks, masks = packed_seq_params.blocks, packed_seq_params.masks(self.window)
        if size > 1 and not self.travels:
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self.context_group) for x in (key, value)
            )
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [t, 1, h, d] -> [1, h, t, d]
        if self.travels:
            output = RingAttention.apply(q, k, v, self.scoring, blocks, masks, self.context_group)
        else:
            repeats = query.shape[2] // key.shape[2]
            if repeats > 1:
                k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
            spans = [block.key_spans(tokens, size) for block in blocks]
            queries = take_spans(q, [[(block.start, block.stop)] for block in blocks])
            attended = zip(queries, take_spans(k, spans), take_spans(v, spans), masks, strict=True)
            output = torch.cat([self.scoring.attend(*block) for block in attended], 2)
        return output.permute(2, 0, 1, 3).reshape(tokens, 1, -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Nothing to save."""
        return {}
