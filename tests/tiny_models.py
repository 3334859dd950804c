"""Tiny random Hugging Face models, made on the spot."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen2-moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "deepseek-v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek-v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
}
_LATENT_ATTENTION: dict[str, object] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
}
# Where a family allows it, every number differs from the defaults of Transformers' and of Megatron-Core's classes, so
# that no default can stand in for a field (tests/conformance/test_defaults.py).
_OPTIONS: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 3},
    "qwen2-moe": {
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
    },
    "qwen3-moe": {  # the first layer is dense
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "gemma2": {  # in rows of up to 20 tokens every limit is felt
        "tie_word_embeddings": True,
        "sliding_window": 6,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 1.0,
        "query_pre_attn_scalar": 20,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "gemma3": {
        "tie_word_embeddings": True,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 100,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
        },
    },
    "deepseek-v2": _LATENT_ATTENTION
    | {"num_experts_per_tok": 3, "n_shared_experts": 3, "routed_scaling_factor": 1.5, "q_lora_rank": None},
    "deepseek-v3": _LATENT_ATTENTION
    | {
        "num_experts_per_tok": 4,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
        "num_mtp_layers": 0,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
}
VOCAB_SIZE = 100  # not a multiple of anything, so that vocabulary padding is at work


def make_model(
    directory: Path, *, family: str = "llama", tied: bool = False, seed: int = 0, **overrides: object
) -> Path:
    """Save a random model of a family, large enough weights that every part matters, and return its directory."""
    config_class, model_class = _CLASSES[family]
    options = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 3e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family.startswith(("qwen2", "deepseek")):
        del options["head_dim"]  # Qwen2 always has hidden / heads, DeepSeek sizes of its own
    options |= _OPTIONS.get(family, {}) | overrides
    if isinstance(kinds := options.get("layer_types"), list):
        options["layer_types"] = [kinds[i % len(kinds)] for i in range(int(str(options["num_hidden_layers"])))]
    torch.manual_seed(seed)
    model = model_class(config_class(**options)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.08 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
    model.save_pretrained(directory)
    return directory


def make_reward_model(
    directory: Path, *, family: str = "llama", seed: int = 0, entries: dict[str, object] | None = None, **sizes: object
) -> Path:
    """Save a random sequence classifier of one label, with more entries in config.json."""
    config = AutoConfig.from_pretrained(make_model(directory, family=family, seed=seed, **sizes))
    config.num_labels, config.pad_token_id = 1, 0
    model = AutoModelForSequenceClassification.from_pretrained(directory, config=config, dtype=torch.float32)
    torch.manual_seed(seed + 1)
    model.score.weight.data = 0.3 * torch.randn_like(model.score.weight)
    model.save_pretrained(directory)
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | (entries or {})))
    return directory


def store_head(model_dir: Path, *, equal: bool) -> Path:
    """Add an lm_head.weight to a tied model: the embedding's numbers, or others in its last row alone."""
    path = model_dir / "model.safetensors"
    weights = load_file(path)
    head = weights["model.embed_tokens.weight"].clone()
    if not equal:
        head[-1] *= -1
    save_file(weights | {"lm_head.weight": head}, path, {"format": "pt"})
    return model_dir
