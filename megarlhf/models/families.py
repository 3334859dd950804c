"""Dense architectures: the Llama family and its close relatives. Other tables build on these parts."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from megarlhf.formats.huggingface import HFConfig
from megarlhf.models.arch import ArchSpec, Split, WeightMap

LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."


def head_dim(config: HFConfig) -> int:
    """Channels of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_parameters(config: HFConfig) -> dict[str, Any]:
    """RoPE's settings, of the layers without a window where those with one have their own."""
    parameters: dict[str, Any] = config.rope_parameters or {}
    return parameters.get("full_attention", parameters)


def norm(megatron: tuple[str, ...], hf: str, size: str = "hidden") -> WeightMap:
    """A layer norm's weight; names are given within the layer."""
    return WeightMap(
        megatron=tuple(LAYER + name for name in megatron),
        hf=(HF_LAYER + hf,),
        shapes=((size,),),
        split=Split.REPLICATED,
    )


def gate_up(megatron: tuple[str, ...], hf: tuple[str, str], size: str, *, expert: bool = False) -> WeightMap:
    """The two input matrices of a gated feed-forward part."""
    return WeightMap(
        megatron=tuple(LAYER + name for name in megatron),
        hf=tuple(HF_LAYER + name for name in hf),
        shapes=((size, "hidden"),) * 2,
        split=Split.GATE_UP,
        expert=expert,
    )


def row(megatron: tuple[str, ...], hf: str, size: str, *, expert: bool = False) -> WeightMap:
    """A matrix back to the hidden size, cut along its inputs."""
    return WeightMap(
        megatron=tuple(LAYER + name for name in megatron),
        hf=(HF_LAYER + hf,),
        shapes=(("hidden", size),),
        split=Split.ROW,
        expert=expert,
    )


def _qkv(kind: str) -> WeightMap:
    return WeightMap(
        megatron=(f"{LAYER}self_attention.linear_qkv.{kind}",),
        hf=tuple(f"{HF_LAYER}self_attn.{x}_proj.{kind}" for x in "qkv"),
        shapes=tuple((rows, "hidden") if kind == "weight" else (rows,) for rows in ("q", "kv", "kv")),
        split=Split.QKV,
    )


INPUT_NORM = norm(("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"), "input_layernorm.weight")
QKV, QKV_BIAS = _qkv("weight"), _qkv("bias")
ATTENTION_OUTPUT = row(("self_attention.linear_proj.weight",), "self_attn.o_proj.weight", "q")
QK_NORM = tuple(norm((f"self_attention.{x}_layernorm.weight",), f"self_attn.{x}_norm.weight", "head") for x in "qk")
DENSE = (
    norm(("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"), "post_attention_layernorm.weight"),
    gate_up(("mlp.linear_fc1.weight",), ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "ffn"),
    row(("mlp.linear_fc2.weight",), "mlp.down_proj.weight", "ffn"),
)
MODEL_WEIGHTS = (
    WeightMap(
        megatron=("embedding.word_embeddings.weight",),
        hf=("model.embed_tokens.weight",),
        shapes=(("vocab", "hidden"),),
        split=Split.VOCAB,
    ),
    WeightMap(
        megatron=("decoder.final_layernorm.weight",),
        hf=("model.norm.weight",),
        shapes=(("hidden",),),
        split=Split.REPLICATED,
    ),
    WeightMap(
        megatron=("output_layer.weight",), hf=("lm_head.weight",), shapes=(("vocab", "hidden"),), split=Split.VOCAB
    ),
)
FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "layernorm_epsilon": "rms_norm_eps",
}
CONSTANTS: dict[str, Any] = {
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
}


def dense_dimensions(config: HFConfig) -> dict[str, int]:
    """Sizes of a model with grouped-query attention and dense layers."""
    head = head_dim(config)
    return {
        "one": 1,
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "head": head,
        "q": config.num_attention_heads * head,
        "kv": config.num_key_value_heads * head,
        "ffn": config.intermediate_size,
    }


def check_biases(config: HFConfig) -> list[str]:
    """Weights that no table here has."""
    flags = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    return [f"{name}=True; this table has no weights for it" for name in flags]


def check_llama(config: HFConfig) -> list[str]:
    """What a model of this family computes that Megatron-Core cannot."""
    errors = []
    if config.hidden_act != "silu":
        errors.append(f"hidden_act={config.hidden_act}; this table maps silu only")
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
    config_fields=FIELDS,
    config_constants=CONSTANTS,
    layer_weights=(INPUT_NORM, QKV, ATTENTION_OUTPUT),
    dense_weights=DENSE,
    model_weights=MODEL_WEIGHTS,
    check=check_llama,
    check_weights=check_biases,
    dimensions=dense_dimensions,
)
MISTRAL = replace(LLAMA, hf_class="MistralForCausalLM")
QWEN2 = replace(
    LLAMA,
    hf_class="Qwen2ForCausalLM",
    config_constants=CONSTANTS | {"add_qkv_bias": True},
    layer_weights=(INPUT_NORM, QKV, QKV_BIAS, ATTENTION_OUTPUT),
)
QWEN3 = replace(
    LLAMA,
    hf_class="Qwen3ForCausalLM",
    config_constants=CONSTANTS | {"qk_layernorm": True},
    layer_weights=(INPUT_NORM, QKV, *QK_NORM, ATTENTION_OUTPUT),
)
