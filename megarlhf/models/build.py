"""This rank's part of a Megatron-Core GPTModel, for an HF configuration and a layout."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megarlhf.config.layouts import KernelArguments, LayoutArguments
from megarlhf.config.lora import LoraArguments
from megarlhf.config.precision import PrecisionArguments
from megarlhf.formats.huggingface import HFConfig
from megarlhf.models.arch import Additions, ArchSpec
from megarlhf.models.backend import model_backend
from megarlhf.models.families import head_dim, rope_parameters
from megarlhf.models.heads import LMHead, ValueHead
from megarlhf.models.layers import FixedBiasRouter, NormedLinear, TwoRopeAttention, add_around
from megarlhf.models.names import is_tied, padded_vocab_size
from megarlhf.parallel.cpu.attention import SegmentAttention
from megarlhf.parallel.cpu.layers import SegmentLatentAttention, SegmentNorm, use_segment_positions
from megarlhf.parallel.device import device_kind
from megarlhf.parallel.groups import Ranks
from megarlhf.parallel.megatron_versions import FREES_UNSENT_OUTPUTS, class_and_submodules

Head = Literal["lm", "value"]
_FUSIONS = ("apply_rope_fusion", "gradient_accumulation_fusion", "bias_activation_fusion", "bias_dropout_fusion")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What shapes the model besides its architecture."""

    bf16: bool = False
    layout: LayoutArguments = field(default_factory=LayoutArguments)  # sizes of groups come from the ranks instead
    moe_aux_loss_coeff: float = 0.0
    kernels: KernelArguments = field(default_factory=KernelArguments)
    passed: Mapping[str, Any] = field(default_factory=dict)  # fields of TransformerConfig, and others to pass over
    lora: LoraArguments = field(default_factory=LoraArguments)
    value_moments: tuple[float, float] = (0.0, 1.0)  # mean and std that a value head's numbers are normalised by
    precision: PrecisionArguments = field(default_factory=PrecisionArguments)


def passed_fields(config_class: type[Any], passed: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a user's options that are fields of this class; names of an enumeration's members become the members."""
    found = {f.name: (passed[f.name], f.default) for f in dataclasses.fields(config_class) if f.name in passed}
    return {
        name: type(default)[value] if isinstance(default, Enum) and isinstance(value, str) else value
        for name, (value, default) in found.items()
    }


def transformer_config(arch: ArchSpec, hf: HFConfig, ranks: Ranks, options: ModelOptions) -> TransformerConfig:
    """Megatron-Core's configuration for this architecture and layout.

    Dropout is off, as log-probs must be a function of the weights alone.

    Raises:
        ValueError: latent attention under tensor parallelism without sequence parallelism.
    """
    dtype, layout = torch.bfloat16 if options.bf16 else torch.float32, options.layout
    on_gpu, backend = device_kind() == "gpu", model_backend(arch, hf, options.kernels, device=device_kind())
    fields = arch.megatron_fields(hf)
    if arch.is_moe(hf):
        fields |= {
            "expert_model_parallel_size": ranks.ep_size,
            "expert_tensor_parallel_size": ranks.etp_size,
            "moe_router_load_balancing_type": "aux_loss" if options.moe_aux_loss_coeff else "none",
            "moe_aux_loss_coeff": options.moe_aux_loss_coeff,
            "moe_grouped_gemm": backend.uses("moe_grouped_gemm"),
        }
    latent = fields.get("multi_latent_attention", False)
    if latent and ranks.tp_size > 1 and not layout.sequence_parallel:
        raise ValueError(
            f"sequence_parallel=False; {arch.hf_class} with tensor_model_parallel_size={ranks.tp_size} needs it, as "
            "Megatron-Core's latent attention else gives wrong gradients for what all heads share: set it to True"
        )
    return (MLATransformerConfig if latent else TransformerConfig)(
        **fields,
        kv_channels=head_dim(hf),
        tensor_model_parallel_size=ranks.tp_size,
        pipeline_model_parallel_size=ranks.pp_size,
        virtual_pipeline_model_parallel_size=ranks.vpp_size if ranks.vpp_size > 1 else None,
        num_layers_in_first_pipeline_stage=layout.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=layout.decoder_last_pipeline_num_layers,
        context_parallel_size=ranks.cp_size,
        cp_comm_type=layout.cp_comm_type,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=options.bf16,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        perform_initialization=False,
        transformer_impl=backend.transformer_impl,
        use_cpu_initialization=not on_gpu or options.lora.load_in_4bit,  # whole matrices never all on a GPU
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **{name: backend.uses(name) for name in _FUSIONS},
        calculate_per_token_loss=True,
        # With chunks neighbours exchange activations and gradients both ways at once. In one batch, or with shapes sent
        # ahead, the two mix where the pipeline has two ranks: sequences are padded to one length instead.
        variable_seq_lengths=ranks.vpp_size == 1,
        batch_p2p_comm=ranks.vpp_size == 1,
        overlap_p2p_comm=ranks.vpp_size > 1,
        moe_token_dispatcher_type="alltoall",  # demanded by variable_seq_lengths, for dense models too
        deallocate_pipeline_outputs=on_gpu or not FREES_UNSENT_OUTPUTS,
        recompute_granularity=layout.recompute_granularity,
        recompute_method=layout.recompute_method,
        recompute_num_layers=layout.recompute_num_layers,
        **_fp8_fields(options.precision, on_gpu=on_gpu),
        **passed_fields(TransformerConfig, options.passed),
    )


def _fp8_fields(precision: PrecisionArguments, *, on_gpu: bool) -> dict[str, Any]:
    """Of TransformerConfig. `fp8` itself is TransformerEngine's, and set again for each pass (engine/precision.py)."""
    ends = ("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
    names = ("fp8_recipe", "fp8_amax_history_len", "fp8_amax_compute_algo") if on_gpu else ()
    fields = {name: getattr(precision, name) for name in (*ends, *names)} if precision.any_fp8 else {}
    return fields | ({"fp8": precision.fp8_format} if on_gpu and precision.any_fp8 else {})


def _block_spec(config: TransformerConfig, additions: Additions, vp_stage: int | None) -> Any:
    """Megatron-Core's layers of this chunk, with what it lacks put in through their specs."""
    local = config.transformer_impl == "local"
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=not local, normalization="RMSNorm", vp_stage=vp_stage
    )
    norm = SegmentNorm if local else block.layer_norm
    for layer in {id(layer): layer for layer in block.layer_specs}.values():  # layers of one kind share their spec
        if local:
            _use_segments(layer, config, additions)
        _add_to_layer(layer.submodules, config, additions, norm=norm)
    block.layer_norm = norm
    return block


def _use_segments(layer: ModuleSpec, config: TransformerConfig, additions: Additions) -> None:
    """Norms and attention over PyTorch alone."""
    parts, attention = layer.submodules, layer.submodules.self_attention
    parts.input_layernorm = parts.pre_mlp_layernorm = SegmentNorm
    attention.submodules.core_attention = ModuleSpec(
        SegmentAttention, params={"soft_cap": additions.attention_soft_cap}
    )
    if config.multi_latent_attention:
        attention.module = SegmentLatentAttention
        attention.submodules.kv_layernorm = SegmentNorm
        attention.submodules.q_layernorm = IdentityOp if config.q_lora_rank is None else SegmentNorm
    elif config.qk_layernorm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = SegmentNorm


def _add_to_layer(parts: Any, config: TransformerConfig, additions: Additions, *, norm: type) -> None:
    """Layers of ours, on every device."""
    kind, mlp = class_and_submodules(parts.mlp)
    if additions.norms_after:
        attention = parts.self_attention.submodules
        attention.linear_proj = ModuleSpec(NormedLinear, params={"linear": attention.linear_proj, "norm": norm})
        mlp.linear_fc2 = ModuleSpec(NormedLinear, params={"linear": mlp.linear_fc2, "norm": norm})
    if additions.window_rope_theta is not None:
        parts.self_attention.module = TwoRopeAttention
        parts.self_attention.params["window_rope_theta"] = additions.window_rope_theta
    if config.moe_router_enable_expert_bias and kind is MoELayer:
        mlp.router = FixedBiasRouter


def build_model(
    arch: ArchSpec, hf: HFConfig, ranks: Ranks, options: ModelOptions, *, head: Head, seed: int
) -> tuple[list[GPTModel], TransformerConfig]:
    """This rank's chunks of layers, their weights not yet loaded (the value head is drawn from `seed`).

    One chunk, or ranks.vpp_size of them, which lie apart in the model, for the interleaved pipeline schedule.
    """
    config = transformer_config(arch, hf, ranks, options)
    stages = range(ranks.vpp_size) if ranks.vpp_size > 1 else (None,)
    chunks = [_build_chunk(arch, hf, ranks, config, head, stage) for stage in stages]
    if chunks[-1].post_process:
        own = chunks[-1].output_layer
        chunks[-1].output_layer = (
            ValueHead(config, seed, options.value_moments) if head == "value" else LMHead(own)
        )
    return chunks, config


def _build_chunk(
    arch: ArchSpec, hf: HFConfig, ranks: Ranks, config: TransformerConfig, head: Head, vp_stage: int | None
) -> GPTModel:
    rope, additions = rope_parameters(hf), arch.additions(hf)
    is_last = ranks.is_last_stage and vp_stage in (None, ranks.vpp_size - 1)
    model = GPTModel(
        config,
        _block_spec(config, additions, vp_stage),
        vocab_size=padded_vocab_size(hf.vocab_size, ranks.tp_size),
        max_sequence_length=hf.max_position_embeddings,
        pre_process=ranks.is_first_stage and vp_stage in (None, 0),
        post_process=is_last,
        parallel_output=True,
        share_embeddings_and_output_weights=is_tied(hf, head),
        position_embedding_type="rope",
        rotary_base=rope.get("rope_theta", 10000.0),
        rope_scaling=rope.get("rope_type") == "llama3",
        rope_scaling_factor=rope.get("factor", 8.0),
        seq_len_interpolation_factor=rope["factor"] if rope.get("rope_type") == "linear" else None,
        vp_stage=vp_stage,
    )
    if config.transformer_impl == "local":
        use_segment_positions(model)
    add_around(model, additions)
    return model
