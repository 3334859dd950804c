"""The launchers' flags are flags of the program, and their plans are possible."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megarlhf.models.hf_files import read_config
from megarlhf.models.names import model_shapes
from megarlhf.models.registry import find_architecture

ROOT = Path(__file__).parents[2]
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


def dry_run(script: str, tmp_path: Path, **environment: str) -> str:
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / script), "--dry-run"],
        env=os.environ | {"SAVE": str(tmp_path / "run with space")} | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def test_llama_3_8b_on_eight_gpus(llama_3_8b: Path, tmp_path: Path) -> None:
    data = tmp_path / "math.jsonl"
    data.write_text('{"input": "1 + 1", "label": "2"}\n')
    printed = dry_run("ppo_llama3_8b_h100.sh", tmp_path, MODEL=str(llama_3_8b), PROMPT_DATA=str(data))
    lines = [line.split() for line in printed.splitlines()]
    for role in ("actor+reference", "critic", "rollout"):
        assert sum(line[:1] == [role] and line[1].isdecimal() for line in lines if len(line) > 1) == 8, role
    assert "tensor_model_parallel_size: 4" in printed and "bf16: true" in printed


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the launchers put SmolLM2 and the data; made by the first."""
    directory = tmp_path_factory.mktemp("smollm2")
    return {"MODEL": str(directory / "a model"), "DATA": str(directory / "some data")}


@pytest.mark.parametrize("script", ["ppo_smollm2_cpu.sh", "grpo_smollm2_cpu.sh"])
def test_smollm2_on_two_cores(script: str, places: dict[str, str], tmp_path: Path) -> None:
    printed = dry_run(script, tmp_path, **places, PROMPTS="4")
    assert "rollout_batch_size: 4" in printed
    assert not (tmp_path / "run with space").exists()
