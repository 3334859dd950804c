"""Gemma 2 (arXiv:2408.00118) and the text part of Gemma 3 (arXiv:2503.19786).

Norms before and after each part of a layer, a sliding window in most layers, scaled embeddings; Gemma 2 caps attention
scores and logits, Gemma 3 has norms of queries and keys, and a RoPE base of its own in the layers with a window.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F

from megarlhf.formats.huggingface import HFConfig
from megarlhf.models.arch import Additions, ArchSpec, Split
from megarlhf.models.families import (
    CONSTANTS,
    FIELDS,
    INPUT_NORM,
    QK_NORM,
    QKV,
    check_biases,
    dense_dimensions,
    gated,
    layer_weight,
    norm,
    rope_parameters,
)

_ATTENTION_OUTPUT = (
    layer_weight(Split.ROW, "self_attention.linear_proj.linear.weight", "self_attn.o_proj.weight", ("hidden", "q")),
    norm("self_attention.linear_proj.norm.weight", "post_attention_layernorm.weight"),
)
_DENSE = (
    norm(("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"), "pre_feedforward_layernorm.weight"),
    *gated(("mlp.{linear}.weight",), "mlp", "ffn", output="linear_fc2.linear"),
    norm("mlp.linear_fc2.norm.weight", "post_feedforward_layernorm.weight"),
)
_CONSTANTS = CONSTANTS | {"activation_func": partial(F.gelu, approximate="tanh"), "layernorm_zero_centered_gamma": True}


def _config(config: HFConfig) -> dict[str, Any]:
    windows = [int(kind == "sliding_attention") for kind in config.layer_types]
    return {
        "softmax_scale": config.query_pre_attn_scalar**-0.5,
        "window_size": (config.sliding_window - 1, 0) if any(windows) else None,
        "window_attn_skip_freq": windows,
    }


def _additions(config: HFConfig) -> Additions:
    windows = (config.rope_parameters or {}).get("sliding_attention") or {}
    return Additions(
        embedding_scale=config.hidden_size**0.5,
        attention_soft_cap=config.attn_logit_softcapping,
        logit_soft_cap=config.final_logit_softcapping,
        norms_after=True,
        window_rope_theta=windows.get("rope_theta"),
    )


def _check(config: HFConfig) -> list[str]:
    errors = []
    if config.hidden_activation != "gelu_pytorch_tanh":
        errors.append(f"hidden_activation={config.hidden_activation}; this table maps gelu_pytorch_tanh only")
    if config.use_bidirectional_attention:
        errors.append("use_bidirectional_attention=True; a token would see the ones that follow it")
    unknown = set(config.layer_types) - {"sliding_attention", "full_attention"}
    if unknown:
        errors.append(f"layer_types holds {sorted(unknown)}; this table maps sliding_attention and full_attention")
    kind = rope_parameters(config).get("rope_type", "default")
    if kind not in ("default", "linear"):
        errors.append(f"rope_type={kind}; this table maps default and linear")
    window_kind = ((config.rope_parameters or {}).get("sliding_attention") or {}).get("rope_type", "default")
    if window_kind != "default":
        errors.append(f"rope_type={window_kind} of layers with a window; this table maps default only")
    return errors


GEMMA2 = ArchSpec(
    hf_class="Gemma2ForCausalLM",
    config_fields=FIELDS,
    config_constants=_CONSTANTS,
    layer_weights=(INPUT_NORM, QKV, *_ATTENTION_OUTPUT),
    dense_weights=_DENSE,
    check=_check,
    check_weights=check_biases,
    dimensions=dense_dimensions,
    derived_config=_config,
    additions=_additions,
    engine_head="embedding",
)


def _check_gemma3(config: HFConfig) -> list[str]:
    cap = config.attn_logit_softcapping
    ignored = f"attn_logit_softcapping={cap}; Transformers' Gemma 3 has no soft cap in attention"
    return _check(config) + ([ignored] if cap else [])


GEMMA3 = replace(
    GEMMA2,
    hf_class="Gemma3ForCausalLM",
    reward_class="Gemma3TextForSequenceClassification",
    config_constants=_CONSTANTS | {"qk_layernorm": True},
    layer_weights=(INPUT_NORM, QKV, *QK_NORM, *_ATTENTION_OUTPUT),
    check=_check_gemma3,
    engine_head="any",
)
