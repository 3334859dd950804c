"""Architectures with experts: Mixtral, Qwen2-MoE and Qwen3-MoE."""

from dataclasses import replace

from megarlhf.formats.huggingface import HFConfig
from megarlhf.models.arch import Split, WeightMap
from megarlhf.models.families import (
    LLAMA,
    QWEN2,
    QWEN3,
    check_biases,
    check_llama,
    dense_dimensions,
    gated,
    layer_weight,
    norm,
)

# Experts one by one on the CPU, fused into one module by TransformerEngine.
_EXPERTS = ("mlp.experts.local_experts.{expert}.{linear}.weight", "mlp.experts.{linear}.weight{expert}")


def router(hf: str) -> WeightMap:
    """The router's matrix, whole on every rank."""
    return layer_weight(Split.REPLICATED, "mlp.router.weight", hf, ("experts", "hidden"))


def shared_experts(hf: str) -> tuple[WeightMap, WeightMap]:
    """What each token passes beside its experts."""
    return gated(("mlp.shared_experts.{linear}.weight",), hf, "shared")


MOE_NORM = norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight")
EXPERTS = gated(_EXPERTS, "mlp.experts.{expert}", "expert", expert=True)
_MIXTRAL_EXPERTS = gated(_EXPERTS, "block_sparse_moe.experts.{expert}", "expert", names=("w1", "w3", "w2"), expert=True)
_SHARED_GATE = layer_weight(
    Split.REPLICATED, "mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", ("one", "hidden")
)


def _qwen_layers(config: HFConfig) -> list[bool]:
    dense, step = config.mlp_only_layers, config.decoder_sparse_step
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(config.num_hidden_layers)]


def _dimensions(config: HFConfig) -> dict[str, int]:
    return dense_dimensions(config) | {
        "experts": getattr(config, "num_local_experts", None) or config.num_experts,
        "expert": getattr(config, "moe_intermediate_size", config.intermediate_size),
        "shared": getattr(config, "shared_expert_intermediate_size", 0),
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
    moe_weights=(MOE_NORM, router("block_sparse_moe.gate.weight"), *_MIXTRAL_EXPERTS),
    check=_check_mixtral,
    dimensions=_dimensions,
    moe_layers=lambda config: [True] * config.num_hidden_layers,
)
QWEN2_MOE = replace(
    QWEN2,
    hf_class="Qwen2MoeForCausalLM",
    config_constants=QWEN2.config_constants | {"moe_shared_expert_gate": True},
    moe_weights=(MOE_NORM, router("mlp.gate.weight"), *EXPERTS, *shared_experts("mlp.shared_expert"), _SHARED_GATE),
    check_weights=_check_qwen2_moe,
    dimensions=_dimensions,
    moe_layers=_qwen_layers,
)
QWEN3_MOE = replace(
    QWEN3,
    hf_class="Qwen3MoeForCausalLM",
    moe_weights=(MOE_NORM, router("mlp.gate.weight"), *EXPERTS),
    dimensions=_dimensions,
    moe_layers=_qwen_layers,
)
