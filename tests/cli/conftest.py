"""A large model as far as it can be told without its weights."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megarlhf.formats.huggingface import read_config
from megarlhf.models.names import model_shapes
from megarlhf.models.registry import find_architecture

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


LLAMA_3_70B = LLAMA_3_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
CODE_LLAMA_34B = LLAMA_3_70B | {
    "intermediate_size": 22016,
    "num_hidden_layers": 48,
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
}


LLAMA_2_7B = LLAMA_3_8B | {
    "intermediate_size": 11008,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}


_SHARD_BYTES = 8 * 2**30  # a machine with less memory than a file has may refuse to map it


def large_model(assets: Path, directory: Path, content: dict[str, Any]) -> Path:
    """A model as far as it can be told without its weights' bytes: they are holes in files."""
    shutil.copytree(assets / "model", directory, ignore=shutil.ignore_patterns("*.safetensors"))
    (directory / "config.json").write_text(json.dumps(content))
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    config = read_config(directory)
    shards: list[dict[str, Any]] = [{}]
    ends = [0]
    for name, shape in model_shapes(find_architecture(config), config, "lm").items():
        if ends[-1] > _SHARD_BYTES:
            shards.append({})
            ends.append(0)
        start, ends[-1] = ends[-1], ends[-1] + 2 * math.prod(shape)
        shards[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, ends[-1]]}
    places = {}
    for number, (header, end) in enumerate(zip(shards, ends, strict=True), start=1):
        weights = directory / f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(header, weights.name)
        text = json.dumps(header).encode()
        weights.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(weights, 8 + len(text) + end)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


@pytest.fixture
def llama_3_8b(assets: Path, tmp_path: Path) -> Path:
    """Llama 3 8B without the bytes of its weights."""
    return large_model(assets, tmp_path / "Llama 3 8B", LLAMA_3_8B)
