"""A configuration that ties the output layer, and weights that say otherwise: the weights are right."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megarlhf.engine.export import export_hf
from megarlhf.formats import huggingface
from megarlhf.formats.huggingface import read_checkpoint
from megarlhf.models.names import check_names
from megarlhf.models.registry import check_engine_head, find_architecture
from megarlhf.trainers.parity_cases import (
    parity_case,
)
from tests.distributed.cases import by_row, make_rows, sequences
from tests.distributed.layouts import LAYOUTS, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model, store_head


def edited(model_dir: Path, **change: torch.Tensor) -> Path:
    """Replace or add tensors."""
    path = model_dir / "model.safetensors"
    save_file(load_file(path) | {name.replace("__", "."): t for name, t in change.items()}, path, {"format": "pt"})
    return model_dir


def transformers_ties(model_dir: Path) -> bool:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("head", ["absent", "equal", "other"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_where_transformers_ties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, head: str) -> None:
    """The tensors differ in the last slice alone."""
    monkeypatch.setattr(huggingface, "_SLICE_BYTES", 7 * 64 * 4)
    model_dir = make_model(tmp_path / "model", tied=True)
    config = json.loads((model_dir / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (model_dir / "config.json").write_text(json.dumps(config))
    if head != "absent":
        store_head(model_dir, equal=head == "equal")
    hf, source = read_checkpoint(model_dir)
    arch = find_architecture(hf)
    if head == "absent" and not tied:  # Transformers draws one and goes on
        with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\]; tie_word_embeddings=False"):
            check_names(arch, hf, source, "lm")
        check_names(arch, hf, source, "value")
    else:
        assert hf.tie_word_embeddings == transformers_ties(model_dir) == (tied and head != "other")
        check_names(arch, hf, source, "lm")


def test_heads_are_compared_as_numbers(tmp_path: Path) -> None:
    """Another dtype is no other number; a number beyond the smaller dtype is."""
    model_dir = make_model(tmp_path / "model", tied=True)
    small = load_file(model_dir / "model.safetensors")["model.embed_tokens.weight"].bfloat16()
    edited(model_dir, model__embed_tokens__weight=small, lm_head__weight=small.float())
    assert read_checkpoint(model_dir)[0].tie_word_embeddings
    edited(model_dir, lm_head__weight=small.float() * (1 + 2**-12))
    assert not read_checkpoint(model_dir)[0].tie_word_embeddings


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", tied=True)
    hf, source = read_checkpoint(edited(model_dir, lm_head__weight=torch.ones(90, 64)))
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(90, 64\)"):
        check_names(find_architecture(hf), hf, source, "lm")


def log_probs_and_export(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, target: Path
) -> tuple[dict[int, torch.Tensor], list[str]]:
    """Log-probs as loaded, then a training step and the export."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        found = engine.log_probs(make_rows())
        engine.train_step(make_rows(), parity_case("sft").objective, denominator=50.0)
        export_hf(engine, target)
        held = by_row(make_rows(), found) if engine.ranks.holds_results else {}
        return held, engine.weights.hf_names()


@pytest.mark.parametrize("head", ["equal", "other"])
@pytest.mark.parametrize("name", ["TP2", "PP2"])
def test_log_probs_and_export_of_every_layout(ranks: RankPool, tmp_path: Path, name: str, head: str) -> None:
    layout = LAYOUTS[name]
    model_dir = store_head(make_model(tmp_path / "model", tied=True), equal=head == "equal")
    results = ranks.run(layout.world_size, log_probs_and_export, layout, model_dir, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    rows, found = make_rows(), {k: v for part, _ in results for k, v in part.items()}
    assert len(found) == len(rows)
    for index, (tokens, prompt_length) in enumerate(sequences(rows)):
        ids = torch.tensor([tokens])
        logits = model(ids[:, :-1]).logits[0, prompt_length - 1 :].log_softmax(-1)
        expected = logits.gather(-1, ids[0, prompt_length:, None])[:, 0]
        torch.testing.assert_close(found[index], expected.detach(), atol=1e-5, rtol=0)
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert ("lm_head.weight" in written) == (head == "other")
    assert all(sorted(names) == sorted(written) for _, names in results)  # what a weight sync sends
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] == (head == "equal")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    both = trained.lm_head.weight, trained.model.embed_tokens.weight
    assert torch.equal(*both) == (head == "equal")
    assert not torch.equal(both[0], model.lm_head.weight) and not torch.equal(both[1], model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("family", "head", "message"),
    [
        ("gemma2", "equal", "stores lm_head.weight; .*: remove it"),
        ("gemma2", "other", "stores lm_head.weight; .*: this model cannot generate there"),
        ("deepseek-v3", "absent", "stores no lm_head.weight"),
    ],
)
def test_heads_that_vllm_has_no_place_for(tmp_path: Path, family: str, head: str, message: str) -> None:
    model_dir = make_model(tmp_path / "model", family=family, tied=True)
    if head != "absent":
        store_head(model_dir, equal=head == "equal")
    hf, source = read_checkpoint(model_dir)
    with pytest.raises(ValueError, match=message):
        check_engine_head(find_architecture(hf), hf, source)


@pytest.mark.parametrize(("family", "tied"), [("gemma2", True), ("gemma3", True), ("deepseek-v3", False)])
def test_heads_that_vllm_takes(tmp_path: Path, family: str, tied: bool) -> None:
    hf, source = read_checkpoint(make_model(tmp_path / "model", family=family, tied=tied))
    check_engine_head(find_architecture(hf), hf, source)
