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


@pytest.fixture
def llama_3_8b(assets: Path, tmp_path: Path) -> Path:
    """Llama 3 8B as far as it can be told without its weights' bytes: they are one hole in a file."""
    directory = tmp_path / "Llama 3 8B"
    shutil.copytree(assets / "model", directory, ignore=shutil.ignore_patterns("*.safetensors"))
    (directory / "config.json").write_text(json.dumps(LLAMA_3_8B))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    config = read_config(directory)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in model_shapes(find_architecture(config), config, "lm").items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    weights = directory / "model.safetensors"
    weights.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(weights, 8 + len(text) + end)
    return directory
