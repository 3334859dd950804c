"""Merging adapters: PEFT's own merge is the oracle."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megarlhf.cli.merge_lora import main
from tests.tiny_models import make_model


def adapter(model: Any, directory: Path, task: str, **options: Any) -> Any:
    """A random adapter of a model, saved."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], task_type=task, **options)
    made = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_" in name or "score" in name:
            parameter.data.normal_(std=0.1)
    made.save_pretrained(directory)
    return made


def flags(model: Path, tmp_path: Path) -> list[str]:
    paths = {"model_path": model, "lora_path": tmp_path / "lora", "output_path": tmp_path / "merged"}
    return [word for name, path in paths.items() for word in (f"--{name}", str(path))]


def test_a_causal_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, ids = make_model(tmp_path / "model"), torch.tensor([[5, 7, 9, 11]])
    made = adapter(AutoModelForCausalLM.from_pretrained(model), tmp_path / "lora", "CAUSAL_LM")
    unmerged = made(ids).logits
    assert main([*flags(model, tmp_path), "--dry-run"]) == 0 and not (tmp_path / "merged").exists()
    assert f"{tmp_path / 'merged'}, 0.00 GiB (not written" in capsys.readouterr().out
    assert main(flags(model, tmp_path)) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, unmerged, atol=1e-5, rtol=0)
    started = subprocess.run([sys.executable, "-m", "megarlhf.cli.merge_lora"], capture_output=True, text=True)
    assert started.returncode == 2 and "model_path is missing" in started.stderr
    assert (unmerged - AutoModelForCausalLM.from_pretrained(model)(ids).logits).abs().max() > 0.1
    whole = made.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-6, rtol=0)


def test_a_reward_model_in_bfloat16(tmp_path: Path) -> None:
    model, ids = make_model(tmp_path / "model"), torch.tensor([[5, 7, 9, 11]])
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, pad_token_id=0)
    made = adapter(base, tmp_path / "lora", "SEQ_CLS")
    assert main([*flags(model, tmp_path), "--is_rm", "--bf16"]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", pad_token_id=0)
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.float()(ids).logits, made(ids).logits, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("option", [{"use_rslora": True}, {"use_dora": True}])
def test_other_kinds_are_refused(tmp_path: Path, option: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model")
    adapter(AutoModelForCausalLM.from_pretrained(model), tmp_path / "lora", "CAUSAL_LM", **option)
    assert main(flags(model, tmp_path)) != 0
    assert f"{next(iter(option))}=True is not plain LoRA" in capsys.readouterr().err


def test_an_adapter_that_is_not_whole_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, lora = make_model(tmp_path / "model"), tmp_path / "lora"
    adapter(AutoModelForCausalLM.from_pretrained(model), lora, "CAUSAL_LM")
    tensors, config = (
        load_file(lora / "adapter_model.safetensors"),
        json.loads((lora / "adapter_config.json").read_text()),
    )
    (lora / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "r"}))
    assert main(flags(model, tmp_path)) == 2
    assert "adapter_config.json has r=None and lora_alpha=5" in capsys.readouterr().err
    (lora / "adapter_config.json").write_text(json.dumps(config))
    gone = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, lora / "adapter_model.safetensors")
    assert main(flags(model, tmp_path)) == 2
    said = capsys.readouterr().err
    assert "adapter_model.safetensors lacks" in said and gone.removeprefix("base_model.model.") in said


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep, shallow = make_model(tmp_path / "deep"), make_model(tmp_path / "shallow", num_hidden_layers=2)
    adapter(AutoModelForCausalLM.from_pretrained(deep), tmp_path / "lora", "CAUSAL_LM")
    assert main(flags(shallow, tmp_path)) != 0
    assert "layers.2" in capsys.readouterr().err and not (tmp_path / "merged").exists()
