"""Dense architectures: the Llama family and its close relatives. Other tables build on these parts."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from megarlhf.formats.huggingface import HFConfig
from megarlhf.models.arch import ArchSpec, Split, WeightMap


def head_dim(config: HFConfig) -> int:
    """Channels of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_parameters(config: HFConfig) -> dict[str, Any]:
    """RoPE's settings, of the layers without a window where those with one have their own."""
    parameters: dict[str, Any] = config.rope_parameters or {}
    return parameters.get("full_attention", parameters)


Names = str | tuple[str, ...]


def layer_weight(
    split: Split, megatron: Names, hf: Names, *shapes: tuple[str, ...], expert: bool = False, buffer: bool = False
) -> WeightMap:
    """A weight of every layer; names are given within the layer."""
    ours, theirs = ((names,) if isinstance(names, str) else names for names in (megatron, hf))
    return WeightMap(
        megatron=tuple(f"decoder.layers.{{layer}}.{name}" for name in ours),
        hf=tuple(f"model.layers.{{layer}}.{name}" for name in theirs),
        shapes=shapes,
        split=split,
        expert=expert,
        buffer=buffer,
    )


def norm(megatron: Names, hf: str, size: str = "hidden") -> WeightMap:
    """A layer norm's weight."""
    return layer_weight(Split.REPLICATED, megatron, hf, (size,))


def gated(
    megatron: tuple[str, ...],
    hf: str,
    size: str,
    *,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    output: str = "linear_fc2",
    expert: bool = False,
) -> tuple[WeightMap, WeightMap]:
    """The matrices of a gated feed-forward part: gate and up, and the one back to the hidden size.

    Args:
        megatron: accepted names of both, with `{linear}` in the place of "linear_fc1" and of `output`.
        hf: name of the part, which holds matrices of these `names`.
    """
    first, second = (tuple(m.replace("{linear}", linear) for m in megatron) for linear in ("linear_fc1", output))
    gate, up, down = (f"{hf}.{name}.weight" for name in names)
    return (
        layer_weight(Split.GATE_UP, first, (gate, up), (size, "hidden"), (size, "hidden"), expert=expert),
        layer_weight(Split.ROW, second, down, ("hidden", size), expert=expert),
    )


def _qkv(kind: str, *inputs: str) -> WeightMap:
    names = tuple(f"self_attn.{x}_proj.{kind}" for x in "qkv")
    shapes = ((rows, *inputs) for rows in ("q", "kv", "kv"))
    return layer_weight(Split.QKV, f"self_attention.linear_qkv.{kind}", names, *shapes)


INPUT_NORM = norm(("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"), "input_layernorm.weight")
QKV, QKV_BIAS = _qkv("weight", "hidden"), _qkv("bias")
ATTENTION_OUTPUT = layer_weight(
    Split.ROW, "self_attention.linear_proj.weight", "self_attn.o_proj.weight", ("hidden", "q")
)
QK_NORM = tuple(norm(f"self_attention.{x}_layernorm.weight", f"self_attn.{x}_norm.weight", "head") for x in "qk")
DENSE = (
    norm(("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"), "post_attention_layernorm.weight"),
    *gated(("mlp.{linear}.weight",), "mlp", "ffn"),
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
