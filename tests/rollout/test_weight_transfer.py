"""Weight updates for other architectures, other dtypes and two ranks; an engine for each, so slow."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megarlhf.rollout import reload, weight_sources
from megarlhf.rollout.engine import RolloutEngine
from tests.rollout.models import (
    Answer,
    SharedModel,
    answers,
    make_engine_model,
    make_prompts,
    perturbed,
    transformers_log_probs,
)
from tests.tiny_models import store_head

pytestmark = pytest.mark.slow
PROMPTS = make_prompts([5, 40, 70])


def start(model_dir: Path, **options: Any) -> RolloutEngine:
    options = {"dtype": "float32", "threads": 1} | options
    return RolloutEngine(model_dir, seed=0, max_model_len=128, max_num_seqs=16, kv_cache_gib=0.1, **options)


def generate(engine: RolloutEngine) -> list[Answer]:
    groups = engine.generate(
        PROMPTS,
        group_ids=[0, 1, 2],
        n_samples=2,
        max_tokens=12,
        temperature=1.0,
        stop_token_ids=[2],
        run_seed=1,
        step=0,
    )
    return answers(groups)


def assert_parity(samples: list[Answer], model: torch.nn.Module, *, atol: float = 1e-4) -> None:
    for sample in samples:
        ours = torch.tensor(sample.rollout_log_probs)
        torch.testing.assert_close(ours, transformers_log_probs(model, sample, 1.0), atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("llama", False),
        ("mistral", False),
        ("qwen2", True),
        ("qwen2", False),
        ("qwen3", True),
        ("qwen3", False),
        ("gemma2", True),
        ("gemma3", True),
    ],
)
def test_direct_and_loader_agree_with_transformers(
    tmp_path: Path, family: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = make_engine_model(tmp_path / "model", family=family, tied=tied)
    model = perturbed(model_dir, seed=1)
    engine = start(model_dir)
    try:
        results = []
        for way in ("direct", "cut", "loader", "direct"):
            with monkeypatch.context() as patch:
                if way == "loader":
                    patch.setattr(weight_sources, "plan_direct_update", lambda model, tensors: None)
                shared = SharedModel(perturbed(model_dir, seed=9), cut=way == "cut")
                engine.connect_weights(shared.blocks)
            engine.update_weights(1, shared.checksum())
            shared.write(model)
            reported = engine.update_weights(2, shared.checksum())
            assert reported["applied"] == ("loader" if way == "loader" else "direct")
            results.append([(s.response_ids, s.rollout_log_probs) for s in generate(engine)])
        assert all(result == results[0] for result in results)
        assert_parity(generate(engine), model)
    finally:
        engine.close()


@pytest.mark.parametrize("head", ["equal", "other"])
def test_a_tied_configuration_with_a_head_of_its_own(
    tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generates with the head that is stored, and takes the weights that the trainer sends of such a model."""
    model_dir = store_head(make_engine_model(tmp_path / "model"), equal=head == "equal")
    sent = store_head(make_engine_model(tmp_path / "sent"), equal=head == "equal")
    if head == "equal":  # the trainer has one tensor for both
        sent = make_engine_model(tmp_path / "sent-once")
    engine = start(model_dir)
    try:
        assert_parity(generate(engine), AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32))
        for version, way in enumerate(("direct", "loader"), start=1):
            model = perturbed(sent, seed=version)
            with monkeypatch.context() as patch:
                if way == "loader":
                    patch.setattr(weight_sources, "plan_direct_update", lambda model, tensors: None)
                shared = SharedModel(model)
                engine.connect_weights(shared.blocks)
            assert engine.update_weights(version, shared.checksum())["applied"] == way
            assert_parity(generate(engine), model)
    finally:
        engine.close()


def test_heads_that_are_equal_in_bfloat16_alone_stay_two(tmp_path: Path) -> None:
    """vLLM compares what it has rounded, and would take the trainer's two tensors into one."""
    model_dir = make_engine_model(tmp_path / "model")
    path = model_dir / "model.safetensors"
    weights = {name: t.bfloat16().float() for name, t in load_file(path).items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * (1 + 2**-12)
    save_file(weights, path, {"format": "pt"})
    sent = perturbed(store_head(make_engine_model(tmp_path / "sent"), equal=False), seed=1)
    with torch.no_grad():
        sent.lm_head.weight.mul_(-1)
    engine = start(model_dir, dtype="bfloat16")
    try:
        shared = SharedModel(sent)
        engine.connect_weights(shared.blocks)
        engine.update_weights(1, shared.checksum())
        assert_parity(generate(engine), sent, atol=0.15)
    finally:
        engine.close()


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_experts_are_packed_again(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap that `forget_expert_kernels` is for: without it experts compute with unpacked weights."""
    model_dir = make_engine_model(tmp_path / "model", family=family, tied=False)
    model = perturbed(model_dir, seed=1)
    shared = SharedModel(model)
    engine = start(model_dir)
    engine.connect_weights(shared.blocks)
    try:
        if family == "mixtral":  # the others' experts are padded for the CPU, so that vLLM fails aloud
            with monkeypatch.context() as patch:
                patch.setattr(reload, "forget_expert_kernels", lambda model: None)
                engine.update_weights(1, shared.checksum())
            sample = generate(engine)[0]
            wrong = torch.tensor(sample.rollout_log_probs) - transformers_log_probs(model, sample, 1.0)
            assert float(wrong.abs().max()) > 1e-2
        for version in (2, 3):
            engine.update_weights(version, shared.checksum())
            assert_parity(generate(engine), model)
    finally:
        engine.close()


def test_bfloat16_engine_takes_float32_and_bfloat16_weights(tmp_path: Path) -> None:
    model_dir = make_engine_model(tmp_path / "model")
    model = perturbed(model_dir, seed=1)
    engine = start(model_dir, dtype="bfloat16")
    try:
        before = [(s.response_ids, s.rollout_log_probs) for s in generate(engine)]
        results = []
        for version, dtype in enumerate([torch.float32, torch.bfloat16], start=1):
            shared = SharedModel(model, dtype=dtype)
            engine.connect_weights(shared.blocks)
            assert engine.update_weights(version, shared.checksum())["applied"] == "direct"
            results.append([(s.response_ids, s.rollout_log_probs) for s in generate(engine)])
        assert results[0] == results[1] != before
    finally:
        engine.close()


@pytest.mark.parametrize("tied", [True, False])
def test_two_tensor_parallel_ranks(tmp_path: Path, tied: bool) -> None:
    model_dir = make_engine_model(tmp_path / "model", tied=tied)
    engine = start(model_dir, tensor_parallel_size=2, threads=2)
    try:
        for version in (1, 2):
            model = perturbed(model_dir, seed=version)
            shared = SharedModel(model, cut=version == 2)
            engine.connect_weights(shared.blocks)
            reported = engine.update_weights(version, shared.checksum())
            assert (reported["version"], reported["checksum"]) == (version, shared.checksum())
            assert_parity(generate(engine), model)
        for version in (3, 4):  # both workers' answers are taken, so that the second call gets its own
            with pytest.raises(ValueError, match=f"weight version {version} does not match"):
                engine.update_weights(version, "0" * 32)
        assert {s.weight_version for s in generate(engine)} == {2}
        engine.update_weights(5, shared.checksum())
        assert {s.weight_version for s in generate(engine)} == {5}
        assert len(engine._llm.collective_rpc("weight_status")) == 2
    finally:
        engine.close()
