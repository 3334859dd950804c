"""Architectures with experts: Mixtral, Qwen2-MoE and Qwen3-MoE."""

from dataclasses import replace
from typing import Any

from megarlhf.formats.huggingface import HFConfig
from megarlhf.models.arch import Split, WeightMap
from megarlhf.models.families import (
    DENSE,
    FIELDS,
    HF_LAYER,
    LAYER,
    LLAMA,
    QWEN2,
    QWEN3,
    check_biases,
    check_llama,
    dense_dimensions,
    gate_up,
    norm,
    row,
)

# Experts one by one on the CPU, fused into one module by TransformerEngine.
_FC1 = ("mlp.experts.local_experts.{expert}.linear_fc1.weight", "mlp.experts.linear_fc1.weight{expert}")
_FC2 = ("mlp.experts.local_experts.{expert}.linear_fc2.weight", "mlp.experts.linear_fc2.weight{expert}")


def router(hf: str) -> WeightMap:
    """The router's matrix, whole on every rank."""
    return WeightMap(
        megatron=(LAYER + "mlp.router.weight",),
        hf=(HF_LAYER + hf,),
        shapes=(("experts", "hidden"),),
        split=Split.REPLICATED,
    )


MOE_NORM = norm(("pre_mlp_layernorm.weight",), "post_attention_layernorm.weight")
EXPERTS = (
    gate_up(
        _FC1, ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"), "expert", expert=True
    ),
    row(_FC2, "mlp.experts.{expert}.down_proj.weight", "expert", expert=True),
)
_SHARED_EXPERT = (
    gate_up(
        ("mlp.shared_experts.linear_fc1.weight",),
        ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
        "shared",
    ),
    row(("mlp.shared_experts.linear_fc2.weight",), "mlp.shared_expert.down_proj.weight", "shared"),
    WeightMap(
        megatron=(LAYER + "mlp.shared_experts.gate_weight",),
        hf=(HF_LAYER + "mlp.shared_expert_gate.weight",),
        shapes=(("one", "hidden"),),
        split=Split.REPLICATED,
    ),
)


def _all_layers(config: HFConfig) -> list[bool]:
    return [True] * config.num_hidden_layers


def _qwen_layers(config: HFConfig) -> list[bool]:
    step = config.decoder_sparse_step
    return [
        layer not in config.mlp_only_layers and (layer + 1) % step == 0 for layer in range(config.num_hidden_layers)
    ]


def num_experts(config: HFConfig) -> int:
    """Routed experts of a layer."""
    return int(getattr(config, "num_local_experts", None) or config.num_experts)


def _mixtral_dimensions(config: HFConfig) -> dict[str, int]:
    return dense_dimensions(config) | {"experts": num_experts(config), "expert": config.intermediate_size}


def _qwen_dimensions(config: HFConfig) -> dict[str, int]:
    return dense_dimensions(config) | {
        "experts": num_experts(config),
        "expert": config.moe_intermediate_size,
        "shared": getattr(config, "shared_expert_intermediate_size", 0),
    }


def _routing(config: HFConfig, expert_size: int) -> dict[str, Any]:
    """Softmax over the chosen experts equals softmax over all, then renormalised."""
    return {
        "num_moe_experts": num_experts(config),
        "moe_ffn_hidden_size": expert_size,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_pre_softmax": not getattr(config, "norm_topk_prob", True),
    }


def _qwen_config(config: HFConfig) -> dict[str, Any]:
    shared = getattr(config, "shared_expert_intermediate_size", None)
    return _routing(config, config.moe_intermediate_size) | {
        "moe_layer_freq": [int(experts) for experts in _qwen_layers(config)],
        "moe_shared_expert_intermediate_size": shared,
        "moe_shared_expert_gate": shared is not None,
    }


def _check_mixtral(config: HFConfig) -> list[str]:
    jitter = getattr(config, "router_jitter_noise", 0.0)
    errors = [f"router_jitter_noise={jitter}; log-probs must be a function of the weights alone"] if jitter else []
    return check_llama(config) + errors


def _check_qwen2_moe(config: HFConfig) -> list[str]:
    biases = [] if config.qkv_bias else ["qkv_bias=False; this table has biases of q, k and v"]
    return check_biases(config) + biases


MIXTRAL = replace(
    LLAMA,
    hf_class="MixtralForCausalLM",
    config_fields=FIELDS,
    dense_weights=(),
    moe_weights=(
        MOE_NORM,
        router("block_sparse_moe.gate.weight"),
        gate_up(
            _FC1,
            ("block_sparse_moe.experts.{expert}.w1.weight", "block_sparse_moe.experts.{expert}.w3.weight"),
            "expert",
            expert=True,
        ),
        row(_FC2, "block_sparse_moe.experts.{expert}.w2.weight", "expert", expert=True),
    ),
    check=_check_mixtral,
    dimensions=_mixtral_dimensions,
    moe_layers=_all_layers,
    derived_config=lambda config: _routing(config, config.intermediate_size),
)
QWEN2_MOE = replace(
    QWEN2,
    hf_class="Qwen2MoeForCausalLM",
    dense_weights=DENSE,
    moe_weights=(MOE_NORM, router("mlp.gate.weight"), *EXPERTS, *_SHARED_EXPERT),
    check_weights=_check_qwen2_moe,
    dimensions=_qwen_dimensions,
    moe_layers=_qwen_layers,
    derived_config=_qwen_config,
)
QWEN3_MOE = replace(
    QWEN3,
    hf_class="Qwen3MoeForCausalLM",
    dense_weights=DENSE,
    moe_weights=(MOE_NORM, router("mlp.gate.weight"), *EXPERTS),
    dimensions=_qwen_dimensions,
    moe_layers=_qwen_layers,
    derived_config=_qwen_config,
)
