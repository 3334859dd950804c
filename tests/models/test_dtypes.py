"""Checkpoints whose tensors have several dtypes: trained from, and exported tensor by tensor as they were stored."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarlhf.formats.huggingface import read_checkpoint
from megarlhf.models.names import check_names, stored_dtypes
from megarlhf.models.registry import find_architecture
from tests.conversion.test_convert import VERIFIED, to_hf, train_and_save
from tests.distributed.layouts import LAYOUTS, SINGLE
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


def mixed(model_dir: Path, dtype: torch.dtype) -> Path:
    """Norms in float32, the rest in `dtype`, buffers as Transformers before 4.40 stored them."""
    path = model_dir / "model.safetensors"
    weights = {name: t if "norm" in name else t.to(dtype) for name, t in load_file(path).items()}
    weights |= {f"model.layers.{i}.self_attn.{name}": torch.ones(16) for i in range(4) for name in BUFFERS}
    save_file(weights, path, {"format": "pt"})
    return model_dir


@pytest.mark.parametrize(
    ("dtype", "head", "name"),
    [
        (torch.bfloat16, "lm", "PP2"),
        (torch.float16, "lm", "SINGLE"),
        (torch.float16, "value", "SINGLE"),
    ],
)
def test_every_tensor_keeps_its_dtype(
    ranks: RankPool, tmp_path: Path, dtype: torch.dtype, head: str, name: str
) -> None:
    layout = {"SINGLE": SINGLE, **LAYOUTS}[name]
    source, run = mixed(make_model(tmp_path / "model"), dtype), tmp_path / "run"
    ranks.run(layout.world_size, train_and_save, layout, source, head, run)
    stored, written = load_file(source / "model.safetensors"), load_file(run / "hf" / "model.safetensors")
    expected = {name: t.dtype for name, t in stored.items() if not name.endswith(BUFFERS)}
    if head == "value":  # the drawn head has the embedding's
        del expected["lm_head.weight"]
        expected["score.weight"] = dtype
    assert {name: t.dtype for name, t in written.items()} == expected
    assert set(expected.values()) == {dtype, torch.float32}
    assert any(not torch.equal(t, stored[name]) for name, t in written.items() if name in stored)
    config = json.loads((run / "hf" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    role = "critic" if head == "value" else "actor"
    to_hf(run, tmp_path / "converted", VERIFIED, role=role)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "converted" / file).read_bytes() == (run / "hf" / file).read_bytes(), file


@pytest.mark.parametrize(("dtype", "word"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_what_is_not_trained_from_is_named(tmp_path: Path, dtype: torch.dtype, word: str) -> None:
    model_dir = make_model(tmp_path / "model")
    path = model_dir / "model.safetensors"
    save_file({n: t.to(dtype) if "q_proj" in n else t for n, t in load_file(path).items()}, path, {"format": "pt"})
    hf, source = read_checkpoint(model_dir)
    with pytest.raises(ValueError, match=f"dtype {word} of .'model.layers.0.self_attn.q_proj.weight'"):
        stored_dtypes(find_architecture(hf), hf, source, "lm")


def test_other_buffers_are_unknown(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model")
    path = model_dir / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.masked_bias": torch.ones(1)}, path, {"format": "pt"})
    hf, source = read_checkpoint(model_dir)
    with pytest.raises(ValueError, match=r"unknown \['model.layers.0.self_attn.masked_bias'\]"):
        check_names(find_architecture(hf), hf, source, "lm")
