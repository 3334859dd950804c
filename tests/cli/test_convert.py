"""What the conversion programs refuse, each with one sentence and status 2, and what inspect prints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarlhf.cli.convert import num_bytes_of
from megarlhf.cli.main import main
from tests.tiny_models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def megatron(model: Path) -> Path:
    save = model.parent / "megatron"
    assert main(["convert", "hf-to-megatron", "--load", str(model), "--save", str(save)]) == 0
    return save


def refused(direction: str, load: Path | str, save: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What is said; nothing may be left behind."""
    before = sorted(save.parent.iterdir()) if save.parent.exists() else []
    capsys.readouterr()
    assert main(["convert", direction, "--load", str(load), "--save", str(save), *flags]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.strip().count("\n") == 0, said
    assert sorted(save.parent.iterdir()) == before
    return said


def edited(model: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of the model with other tensors."""
    shutil.copytree(model, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("model.norm.weight"), ("missing ['model.norm.weight']",)),
        (lambda w: w.update(extra=torch.ones(1)), ("unknown ['extra']",)),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(63), "lm_head.weight": torch.ones(2, 2)}),
            ("model.norm.weight has shape (63,)", "lm_head.weight has shape (2, 2)"),
        ),
        (
            lambda w: w["model.layers.2.mlp.up_proj.weight"].view(-1)[5].fill_(torch.nan),
            ("layers.2.mlp.up_proj", "NaN"),
        ),
        (lambda w: w.update({k: v.to(torch.int8) for k, v in w.items() if "norm" in k}), ("int8",)),
    ],
    ids=["missing", "extra", "shape", "nan", "dtype"],
)
def test_tensors_that_do_not_fit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, words: tuple[str, ...]
) -> None:
    source = edited(model, tmp_path / "edited", change)
    said = refused("hf-to-megatron", source, tmp_path / "out", capsys)
    for word in words:
        assert word in said


def test_reward_model_without_its_head(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its place is not taken by a drawn one."""
    source = edited(model, tmp_path / "edited", lambda w: w.pop("lm_head.weight"))
    config = json.loads((source / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    (source / "config.json").write_text(json.dumps(config))
    assert "missing ['score.weight']" in refused("hf-to-megatron", source, tmp_path / "out", capsys)


def test_nan_is_converted_where_allowed(model: Path, tmp_path: Path) -> None:
    source = edited(model, tmp_path / "edited", lambda w: w["model.norm.weight"].fill_(torch.nan))
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["convert", "hf-to-megatron", "--load", str(source), "--save", str(there), "--allow_nan"]) == 0
    assert (
        main(["convert", "megatron-to-hf", "--load", str(there), "--save", str(back), "--allow-nan", "--verify"]) == 0
    )
    assert load_file(back / "model.safetensors")["model.norm.weight"].isnan().all()


def test_numbers_beyond_the_dtype(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = edited(model, tmp_path / "edited", lambda w: w["model.norm.weight"].fill_(1e6))
    assert "beyond its range" in refused("hf-to-megatron", source, tmp_path / "out", capsys, "--dtype", "fp16")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--target-tensor-parallel-size", "3"), ("target_tensor_parallel_size=3", "num_key_value_heads=2")),
        (("--target_pipeline_parallel_size", "3"), ("target_pipeline_parallel_size=3", "num_hidden_layers=4")),
        (("--target-expert-parallel-size", "2"), ("target_expert_parallel_size=2", "num_experts=1")),
        (("--num-threads", "0"), ("num_threads=0",)),
    ],
)
def test_layouts_that_do_not_fit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    said = refused("hf-to-megatron", model, tmp_path / "out", capsys, *flags)
    for word in words:
        assert word in said


def test_truncated_safetensors(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shutil.copytree(model, tmp_path / "cut")
    (source / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    said = refused("hf-to-megatron", source, tmp_path / "out", capsys)
    assert f"load={source}" in said and "not a whole safetensors file" in said


def test_index_that_names_what_is_not_there(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shutil.copytree(model, tmp_path / "indexed")
    index = {"weight_map": {"model.norm.weight": "model.safetensors", "model.ghost.weight": "model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "['model.ghost.weight']" in refused("hf-to-megatron", source, tmp_path / "out", capsys)
    index["weight_map"]["lm_head.weight"] = "model-2.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "missing weight files ['model-2.safetensors']" in refused("hf-to-megatron", source, tmp_path / "out", capsys)


@pytest.mark.parametrize("damage", ["short", "absent", "garbled"])
def test_damaged_megatron_checkpoint(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    source = shutil.copytree(megatron, tmp_path / "damaged")
    (file,) = (source / "release").glob("__0_*.distcp")
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "absent":
        file.unlink()
    else:
        file.write_bytes(bytes(file.stat().st_size))
    said = refused("megatron-to-hf", source, tmp_path / "out", capsys)
    assert {"short": "cut short", "absent": "missing files", "garbled": "is damaged at"}[damage] in said


def test_megatron_checkpoint_of_another_architecture(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", family="qwen2", num_hidden_layers=2)
    said = refused("megatron-to-hf", megatron, tmp_path / "out", capsys, "--hf-model", str(other))
    assert (
        "does not hold this Qwen2ForCausalLM" in said
        and "missing decoder.layers.self_attention.linear_qkv.bias" in said
    )
    assert "decoder.layers.mlp.linear_fc1.weight has shape (4, 192, 64), config.json says (2, 192, 64)" in said


@pytest.mark.parametrize(
    ("load", "word"),
    [
        ("/nowhere", "no such directory"),
        ("{}@7", "iter_0000007"),
        ("{}@last", "neither a number"),
        ("{}/..", "torch_dist"),
    ],
)
def test_no_checkpoint_there(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], load: str, word: str
) -> None:
    assert word in refused("megatron-to-hf", load.format(megatron), tmp_path / "out", capsys)


def test_configuration_is_nowhere(megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = shutil.copytree(megatron / "release", tmp_path / "a" / "b" / "c" / "d")
    assert "--hf-model" in refused("megatron-to-hf", bare, tmp_path / "out", capsys)


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_place_to_make_the_target_in_is_taken(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "chapter-1.txt").write_text("words")
    assert f"{tmp_path}/out.partial, where" in refused("hf-to-megatron", model, tmp_path / "out", capsys, *flags)
    assert (tmp_path / "out.partial" / "chapter-1.txt").read_text() == "words"


@pytest.mark.parametrize(
    "text", ["a: 1", "model: {size: 3}", "model: llama", "- 1", "", "a: [", "model: {pretrain: null}"]
)
def test_a_configuration_of_some_other_program(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    bare = shutil.copytree(megatron / "release", tmp_path / "a" / "b" / "c" / "d")
    (bare.parent / "config.yaml").write_text(text)
    assert "nor a run's config.yaml" in refused("megatron-to-hf", bare, tmp_path / "out", capsys)
    assert main(["inspect", str(bare)]) == 0
    assert "torch_dist), unknown" in capsys.readouterr().out


def test_target_exists(model: Path, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "exists already" in refused("hf-to-megatron", model, megatron, capsys)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.txt").write_text("words")
    assert "is no checkpoint" in refused("hf-to-megatron", model, tmp_path / "thesis", capsys, "--overwrite")
    assert "give another directory" in refused("megatron-to-hf", megatron, megatron, capsys, "--overwrite")
    target = shutil.copytree(model, tmp_path / "older")
    (target / "stale.bin").write_text("")
    assert main(["convert", "megatron-to-hf", "--load", str(megatron), "--save", str(target), "--overwrite"]) == 0
    assert not (target / "stale.bin").exists() and (target / "config.json").exists()


def test_disk_is_full(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    said = refused("hf-to-megatron", model, tmp_path / "out", capsys)
    assert "0.00 GB free where the target takes" in said


def test_dry_run_checks_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    assert main(["convert", "hf_to_megatron", "--load", str(model), "--save", str(tmp_path / "out"), "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_inspect(model: Path, megatron: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model)]) == 0
    said = capsys.readouterr().out
    assert "LlamaForCausalLM" in said and "39 tensors" in said
    (line,) = [line.split() for line in said.splitlines() if "layers.3.mlp.up_proj" in line]
    assert line[1:] == ["96x64", "float32", "24.6", "kB", "model.safetensors"]
    assert main(["inspect", str(megatron)]) == 0
    said = capsys.readouterr().out
    assert "torch_dist), LlamaForCausalLM, iteration release" in said
    (line,) = [line.split() for line in said.splitlines() if "linear_fc1.weight" in line]
    assert line[1:] == ["4x192x64", "float32", "196.6", "kB", "8", "x", "[1x96x64]"]
    assert main(["inspect", "/nowhere"]) == 2


def test_inspect_says_the_layout(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "4")
    assert main(["convert", "hf-to-megatron", "--load", str(model), "--save", str(tmp_path / "cut"), *sizes]) == 0
    assert main(["inspect", str(tmp_path / "cut")]) == 0
    noted = "layout: tensor parallel size 2, pipeline parallel size 4, expert parallel size 1"
    assert noted in capsys.readouterr().out.splitlines()
    (tmp_path / "cut" / "release" / "conversion.json").unlink()
    assert main(["inspect", str(tmp_path / "cut")]) == 0
    seen = "layout: not noted; the embedding's rows lie in 2 parts, as for tensor parallel size 2"
    assert seen in capsys.readouterr().out.splitlines()


def test_unknown_direction(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "sideways"]) == 2
    assert "hf-to-megatron|megatron-to-hf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "num_bytes"), [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("300", 300), ("2mb", 2 * 10**6)]
)
def test_sizes(size: str, num_bytes: int) -> None:
    assert num_bytes_of(size) == num_bytes


@pytest.mark.parametrize("size", ["", "GB", "-1GB", "0", "5 gigs"])
def test_bad_sizes(size: str) -> None:
    with pytest.raises(ValueError, match="max_shard_size"):
        num_bytes_of(size)
