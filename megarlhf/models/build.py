"""This rank's part of a Megatron-Core GPTModel, for an HF configuration and a layout."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megarlhf.models.arch import ArchSpec
from megarlhf.models.heads import ValueHead
from megarlhf.models.hf_files import HFConfig
from megarlhf.parallel.attention import SegmentAttention, SegmentNorm, SegmentRotaryEmbedding
from megarlhf.parallel.device import device_kind
from megarlhf.parallel.groups import Ranks

Head = Literal["lm", "value"]
_VOCAB_MULTIPLE = 128  # Megatron's --make-vocab-size-divisible-by; fixed, so that checkpoints fit every TP size


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What shapes the model besides its architecture."""

    bf16: bool = False
    sequence_parallel: bool = False
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding after padding, so that every rank holds as many."""
    multiple = math.lcm(_VOCAB_MULTIPLE, tp_size)
    return math.ceil(vocab_size / multiple) * multiple


def head_dim(config: HFConfig) -> int:
    """Channels of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def transformer_config(arch: ArchSpec, hf: HFConfig, ranks: Ranks, options: ModelOptions) -> TransformerConfig:
    """Megatron-Core's configuration for this architecture and layout.

    Numerics on the CPU take the unfused paths; dropout is off, as log-probs must be a function of the weights alone.
    """
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    on_gpu = device_kind() == "gpu"
    fields = {name: getattr(hf, hf_name) for name, hf_name in arch.config_fields.items()}
    return TransformerConfig(
        **fields,
        **arch.config_constants,
        kv_channels=head_dim(hf),
        tensor_model_parallel_size=ranks.tp_size,
        pipeline_model_parallel_size=ranks.pp_size,
        context_parallel_size=ranks.cp_size,
        sequence_parallel=options.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=options.bf16,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        persist_layer_norm=on_gpu,
        bias_dropout_fusion=on_gpu,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # demanded by variable_seq_lengths, for dense models too
        batch_p2p_comm=True,
        deallocate_pipeline_outputs=on_gpu,  # on the CPU it corrupts gradients
        recompute_granularity=options.recompute_granularity,
        recompute_method=options.recompute_method,
        recompute_num_layers=options.recompute_num_layers,
        recompute_modules=["core_attn"] if options.recompute_granularity == "selective" else None,
    )


def _block_spec(config: TransformerConfig) -> Any:
    if device_kind() == "gpu":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    parts, attention = layer.submodules, layer.submodules.self_attention.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = SegmentNorm
    attention.core_attention = SegmentAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = SegmentNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=SegmentNorm)


def build_model(
    arch: ArchSpec, hf: HFConfig, ranks: Ranks, options: ModelOptions, *, head: Head, seed: int
) -> tuple[GPTModel, TransformerConfig]:
    """This rank's pipeline stage, its weights not yet loaded (the value head is drawn from `seed`)."""
    config = transformer_config(arch, hf, ranks, options)
    rope = hf.rope_parameters or {}
    model = GPTModel(
        config,
        _block_spec(config),
        vocab_size=padded_vocab_size(hf.vocab_size, ranks.tp_size),
        max_sequence_length=hf.max_position_embeddings,
        pre_process=ranks.is_first_stage,
        post_process=ranks.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=hf.tie_word_embeddings and head == "lm",
        position_embedding_type="rope",
        rotary_base=rope.get("rope_theta", 10000.0),
        rope_scaling=rope.get("rope_type") == "llama3",
        rope_scaling_factor=rope.get("factor", 8.0),
    )
    if device_kind() == "cpu":
        model.rotary_pos_emb.__class__ = SegmentRotaryEmbedding
    if head == "value" and ranks.is_last_stage:
        model.output_layer = ValueHead(config)
        model.output_layer.initialize(seed)
    return model, config
