"""DeepSeek-V3 (arXiv:2412.19437) and those DeepSeek-V2 models (arXiv:2405.04434) that choose experts without groups.

Multi-latent attention: queries, keys and values come up from low-rank latents, of which norms are taken. Experts beside
shared ones, after some dense layers; in V3 chosen by sigmoid scores plus a bias per expert that training leaves alone.
"""

from dataclasses import replace
from typing import Any

from megarlhf.formats.huggingface import HFConfig
from megarlhf.models.arch import ArchSpec, Split, WeightMap
from megarlhf.models.families import (
    CONSTANTS,
    DENSE,
    FIELDS,
    INPUT_NORM,
    check_biases,
    dense_dimensions,
    layer_weight,
    norm,
    rope_parameters,
)
from megarlhf.models.mixtures import EXPERTS, MOE_NORM, router, shared_experts


def _projection(split: Split, megatron: str, hf: str, *shape: str) -> WeightMap:
    return layer_weight(split, f"self_attention.{megatron}.weight", f"self_attn.{hf}.weight", shape)


def _latent_norm(kind: str) -> WeightMap:
    names = (f"self_attention.{kind}_layernorm.weight", f"self_attention.linear_{kind}_up_proj.layer_norm_weight")
    return norm(names, f"self_attn.{kind}_a_layernorm.weight", f"{kind}_latent")


_ATTENTION = (
    _projection(Split.COLUMN, "linear_q_proj", "q_proj", "q_direct", "hidden"),  # without a latent of the queries
    _projection(Split.REPLICATED, "linear_q_down_proj", "q_a_proj", "q_latent", "hidden"),
    _latent_norm("q"),
    _projection(Split.COLUMN, "linear_q_up_proj", "q_b_proj", "q", "q_latent"),
    _projection(Split.REPLICATED, "linear_kv_down_proj", "kv_a_proj_with_mqa", "kv_latent_rope", "hidden"),
    _latent_norm("kv"),
    _projection(Split.COLUMN, "linear_kv_up_proj", "kv_b_proj", "kv", "kv_latent"),
    _projection(Split.ROW, "linear_proj", "o_proj", "hidden", "values"),
)
_EXPERT_BIAS = layer_weight(
    Split.REPLICATED, "mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", ("experts",), buffer=True
)
_EXPERTS = (*EXPERTS, *shared_experts("mlp.shared_experts"))


def _dimensions(config: HFConfig) -> dict[str, int]:
    heads, q_latent = config.num_attention_heads, config.q_lora_rank or 0
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    return dense_dimensions(config) | {
        "q": queries,
        "q_direct": 0 if q_latent else queries,
        "q_latent": q_latent,
        "kv": heads * (config.qk_nope_head_dim + config.v_head_dim),
        "kv_latent": config.kv_lora_rank,
        "kv_latent_rope": config.kv_lora_rank + config.qk_rope_head_dim,
        "values": heads * config.v_head_dim,
        "experts": config.n_routed_experts,
        "expert": config.moe_intermediate_size,
        "shared": config.n_shared_experts * config.moe_intermediate_size,
    }


def _config(config: HFConfig) -> dict[str, Any]:
    rope = rope_parameters(config)
    fields = {
        "rope_type": "rope",
        "rotary_base": rope.get("rope_theta", 10000.0),
        "q_lora_rank": config.q_lora_rank,
        "moe_router_topk_scaling_factor": config.routed_scaling_factor,
    }
    if rope.get("rope_type") != "yarn":
        return fields
    return fields | {
        "rope_type": "yarn",
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "mscale": rope.get("mscale") or 1.0,
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
    }


def _config_v3(config: HFConfig) -> dict[str, Any]:
    groups, chosen = (config.n_group, config.topk_group) if config.n_group > 1 else (None, None)
    return _config(config) | {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


def _check(config: HFConfig) -> list[str]:
    activation, eps = config.hidden_act, config.rms_norm_eps
    errors = [] if activation == "silu" else [f"hidden_act={activation}; this table maps silu only"]
    if eps != 1e-6:
        errors.append(f"rms_norm_eps={eps}; latents have 1e-6 in their norms, Megatron-Core one for all")
    return errors + _check_rope(rope_parameters(config))


def _check_weights(config: HFConfig) -> list[str]:
    errors = check_biases(config)
    if not config.n_shared_experts:
        errors.append(f"n_shared_experts={config.n_shared_experts}; this table maps 1 or more")
    if not getattr(config, "rope_interleave", True):
        errors.append("rope_interleave=False; Megatron-Core's latent attention turns neighbouring channels")
    return errors


def _check_rope(rope: dict[str, Any]) -> list[str]:
    errors = []
    if rope.get("rope_type", "default") not in ("default", "yarn"):
        errors.append(f"rope_type={rope['rope_type']}; Megatron-Core's latent attention offers default and yarn")
    if rope.get("rope_type") == "yarn" and rope.get("factor") is None:
        errors.append("YaRN's factor is missing; Megatron-Core does not work it out of max_position_embeddings")
    if bool(rope.get("mscale")) != bool(rope.get("mscale_all_dim")):
        errors.append("only one of mscale and mscale_all_dim is set; Megatron-Core reads that otherwise: set both")
    if rope.get("attention_factor") is not None:
        errors.append(f"attention_factor={rope['attention_factor']}; Megatron-Core works it out of mscale")
    if not rope.get("truncate", True):
        errors.append("truncate=False; Megatron-Core's latent attention rounds YaRN's range")
    return errors


def _check_v2(config: HFConfig) -> list[str]:
    errors = _check(config)
    if config.topk_method != "greedy":
        errors.append(f"topk_method={config.topk_method}; Megatron-Core scores a group otherwise than by its maximum")
    if config.norm_topk_prob:
        errors.append("norm_topk_prob=True; Transformers' DeepSeek-V2 does not normalise")
    return errors


def _check_v3(config: HFConfig) -> list[str]:
    errors = _check(config)
    per_token, groups = config.num_experts_per_tok, config.topk_group
    if config.n_group > 1 and per_token // groups != 2:
        errors.append(
            f"num_experts_per_tok={per_token} with topk_group={groups}; a group's score is the sum of its best 2, in "
            "Megatron-Core of its best num_experts_per_tok // topk_group"
        )
    if not config.norm_topk_prob or per_token < 2:
        errors.append(
            f"norm_topk_prob={config.norm_topk_prob} with num_experts_per_tok={per_token}; Megatron-Core normalises "
            "sigmoid scores, always and only of 2 or more experts"
        )
    return errors


DEEPSEEK_V2 = ArchSpec(
    hf_class="DeepseekV2ForCausalLM",
    config_fields=FIELDS
    | {
        "kv_lora_rank": "kv_lora_rank",
        "qk_head_dim": "qk_nope_head_dim",
        "qk_pos_emb_head_dim": "qk_rope_head_dim",
        "v_head_dim": "v_head_dim",
    },
    config_constants=CONSTANTS | {"multi_latent_attention": True, "qk_layernorm": True, "moe_router_dtype": "fp32"},
    layer_weights=(INPUT_NORM, *_ATTENTION),
    dense_weights=DENSE,
    moe_weights=(MOE_NORM, router("mlp.gate.weight"), *_EXPERTS),
    check=_check_v2,
    check_weights=_check_weights,
    dimensions=_dimensions,
    moe_layers=lambda config: [n >= config.first_k_dense_replace for n in range(config.num_hidden_layers)],
    derived_config=_config,
    engine_head="own",
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    hf_class="DeepseekV3ForCausalLM",
    config_constants=DEEPSEEK_V2.config_constants
    | {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,  # the bias keeps experts busy in pre-training; here routing stays as it is
    },
    moe_weights=(MOE_NORM, router("mlp.gate.weight"), _EXPERT_BIAS, *_EXPERTS),
    check=_check_v3,
    derived_config=_config_v3,
)
