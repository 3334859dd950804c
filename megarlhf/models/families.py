"""The supported architectures: the Llama family and its two close relatives."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from megarlhf.models.arch import ArchSpec, Split, WeightMap
from megarlhf.models.hf_files import HFConfig

_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_HF_LAYER}self_attn.{x}_proj.{kind}" for x in "qkv")


_LAYER_WEIGHTS = (
    WeightMap(
        megatron=(_LAYER + "input_layernorm.weight", _LAYER + "self_attention.linear_qkv.layer_norm_weight"),
        hf=(_HF_LAYER + "input_layernorm.weight",),
        split=Split.REPLICATED,
    ),
    WeightMap(megatron=(_LAYER + "self_attention.linear_qkv.weight",), hf=_qkv("weight"), split=Split.QKV),
    WeightMap(
        megatron=(_LAYER + "self_attention.linear_proj.weight",),
        hf=(_HF_LAYER + "self_attn.o_proj.weight",),
        split=Split.ROW,
    ),
    WeightMap(
        megatron=(_LAYER + "pre_mlp_layernorm.weight", _LAYER + "mlp.linear_fc1.layer_norm_weight"),
        hf=(_HF_LAYER + "post_attention_layernorm.weight",),
        split=Split.REPLICATED,
    ),
    WeightMap(
        megatron=(_LAYER + "mlp.linear_fc1.weight",),
        hf=(_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        split=Split.GATE_UP,
    ),
    WeightMap(megatron=(_LAYER + "mlp.linear_fc2.weight",), hf=(_HF_LAYER + "mlp.down_proj.weight",), split=Split.ROW),
)
_QKV_BIAS = WeightMap(megatron=(_LAYER + "self_attention.linear_qkv.bias",), hf=_qkv("bias"), split=Split.QKV)
_QK_NORM = tuple(
    WeightMap(
        megatron=(f"{_LAYER}self_attention.{x}_layernorm.weight",),
        hf=(f"{_HF_LAYER}self_attn.{x}_norm.weight",),
        split=Split.REPLICATED,
    )
    for x in "qk"
)
_MODEL_WEIGHTS = (
    WeightMap(megatron=("embedding.word_embeddings.weight",), hf=("model.embed_tokens.weight",), split=Split.VOCAB),
    WeightMap(megatron=("decoder.final_layernorm.weight",), hf=("model.norm.weight",), split=Split.REPLICATED),
    WeightMap(megatron=("output_layer.weight",), hf=("lm_head.weight",), split=Split.VOCAB),
)
_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "layernorm_epsilon": "rms_norm_eps",
}
_CONSTANTS: dict[str, Any] = {
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
}


def _check_llama(config: HFConfig) -> list[str]:
    errors = []
    if config.hidden_act != "silu":
        errors.append(f"hidden_act={config.hidden_act}; this table maps silu only")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            errors.append(f"{name}=True; this table has no weights for it")
    scaling = config.rope_parameters or {}
    kind = scaling.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        errors.append(f"rope_type={kind}; Megatron-Core's rotary embedding offers default and llama3")
    if kind == "llama3":
        fixed = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
        errors += [
            f"rope {name}={scaling[name]}; Megatron-Core fixes it at {value}"
            for name, value in fixed.items()
            if scaling.get(name, value) != value
        ]
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        errors.append(f"sliding_window={window}; attention over a window is not mapped")
    return errors


LLAMA = ArchSpec(
    hf_class="LlamaForCausalLM",
    config_fields=_FIELDS,
    config_constants=_CONSTANTS,
    layer_weights=_LAYER_WEIGHTS,
    model_weights=_MODEL_WEIGHTS,
    check=_check_llama,
)
MISTRAL = replace(LLAMA, hf_class="MistralForCausalLM")
QWEN2 = replace(
    LLAMA,
    hf_class="Qwen2ForCausalLM",
    config_constants=_CONSTANTS | {"add_qkv_bias": True},
    layer_weights=(*_LAYER_WEIGHTS[:2], _QKV_BIAS, *_LAYER_WEIGHTS[2:]),
)
QWEN3 = replace(
    LLAMA,
    hf_class="Qwen3ForCausalLM",
    config_constants=_CONSTANTS | {"qk_layernorm": True},
    layer_weights=(*_LAYER_WEIGHTS[:2], *_QK_NORM, *_LAYER_WEIGHTS[2:]),
)
ARCHITECTURES = {arch.hf_class: arch for arch in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def find_architecture(config: HFConfig) -> ArchSpec:
    """The table for a configuration.

    Raises:
        ValueError: an architecture without a table (the supported ones are listed), or a feature the table lacks.
    """
    name = (config.architectures or ["none"])[0]
    arch = ARCHITECTURES.get(name.replace("ForSequenceClassification", "ForCausalLM"))
    if arch is None:
        raise ValueError(f"architecture {name} has no table; supported: {', '.join(ARCHITECTURES)}")
    errors = arch.check(config)
    if errors:
        raise ValueError(f"architecture {name}: " + "; ".join(errors))
    return arch
