"""Weight updates for other architectures, other dtypes and two ranks; an engine for each, so slow."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.data.types import Sample
from megarlhf.rollout.engine import RolloutEngine
from tests.rollout.models import make_engine_model, make_prompts, perturbed, transformers_log_probs, write_weights

pytestmark = pytest.mark.slow
PROMPTS = make_prompts([5, 40, 70])


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    saved = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(saved)


def start(model_dir: Path, **options: Any) -> RolloutEngine:
    options = {"dtype": "float32", "threads": 1} | options
    return RolloutEngine(model_dir, seed=0, max_model_len=128, max_num_seqs=16, kv_cache_gib=0.1, **options)


def generate(engine: RolloutEngine) -> list[Sample]:
    return engine.generate(
        PROMPTS,
        group_ids=[0, 1, 2],
        n_samples=2,
        max_tokens=12,
        temperature=1.0,
        stop_token_ids=[2],
        run_seed=1,
        step=0,
    )


def assert_parity(samples: list[Sample], model: torch.nn.Module) -> None:
    for sample in samples:
        ours = torch.tensor(sample.rollout_log_probs)
        torch.testing.assert_close(ours, transformers_log_probs(model, sample, 1.0), atol=1e-4, rtol=0)


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
def test_direct_and_loader_agree_with_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    model_dir = make_engine_model(tmp_path / "model", family=family, tied=tied)
    model = perturbed(model_dir, seed=1)
    engine = start(model_dir)
    try:
        results = []
        for version, adjacent in enumerate([True, False, True], start=1):
            path = tmp_path / f"{version}.safetensors"
            engine.update_weights(path, version, write_weights(path, perturbed(model_dir, seed=9), adjacent=adjacent))
            path.unlink()
            checksum = write_weights(path, model, adjacent=adjacent)  # a new file under the old path
            reported = engine.update_weights(path, version, checksum)
            assert reported["applied"] == ("direct" if adjacent else "loader")
            results.append([(s.response_ids, s.rollout_log_probs) for s in generate(engine)])
        assert results[0] == results[1] == results[2]
        assert_parity(generate(engine), model)
    finally:
        engine.close()


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_experts_are_packed_again(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap that `forget_expert_kernels` is for: without it experts compute with unpacked weights."""
    from megarlhf.rollout import weight_transfer

    model_dir = make_engine_model(tmp_path / "model", family=family, tied=False)
    model = perturbed(model_dir, seed=1)
    path = tmp_path / "weights.safetensors"
    checksum = write_weights(path, model)
    engine = start(model_dir)
    try:
        if family == "mixtral":  # the others' experts are padded for the CPU, so that vLLM fails aloud
            with monkeypatch.context() as patch:
                patch.setattr(weight_transfer, "forget_expert_kernels", lambda model: None)
                engine.update_weights(path, 1, checksum)
            sample = generate(engine)[0]
            wrong = torch.tensor(sample.rollout_log_probs) - transformers_log_probs(model, sample, 1.0)
            assert float(wrong.abs().max()) > 1e-2
        for version in (2, 3):
            engine.update_weights(path, version, checksum)
            assert_parity(generate(engine), model)
    finally:
        engine.close()


def test_bfloat16_engine_takes_float32_and_bfloat16_files(tmp_path: Path) -> None:
    model_dir = make_engine_model(tmp_path / "model")
    model = perturbed(model_dir, seed=1)
    engine = start(model_dir, dtype="bfloat16")
    try:
        before = [(s.response_ids, s.rollout_log_probs) for s in generate(engine)]
        results = []
        for version, dtype in enumerate([torch.float32, torch.bfloat16], start=1):  # by the loader, directly
            path = tmp_path / f"{version}.safetensors"
            engine.update_weights(path, version, write_weights(path, model, dtype=dtype))
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
            path = tmp_path / f"{version}.safetensors"
            checksum = write_weights(path, model)
            reported = engine.update_weights(path, version, checksum)
            assert (reported["version"], reported["checksum"]) == (version, checksum)
            assert_parity(generate(engine), model)
        with pytest.raises(RuntimeError, match="does not match"):
            engine.update_weights(path, 3, "0" * 32)
        assert {s.weight_version for s in generate(engine)} == {2}
        assert len(engine.info()["weight_status"]) == 2
    finally:
        engine.close()
