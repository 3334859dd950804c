"""Distillation of two ranks from a teacher of another shape, started as a user does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo.make_assets import make_tokenizer
from tests.cluster.runs import metrics, run
from tests.tiny_models import make_model

Flags = dict[str, str | None]
ROWS = [{"input": f"{i}=", "output": str(i % 7)} for i in range(10)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, and a wider, deeper teacher of another family with a larger vocabulary, which is sure of itself."""
    root = tmp_path_factory.mktemp("distillation")
    tokenizer = make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": 2}
    make_model(root / "student", family="llama", tied=True, num_hidden_layers=2, hidden_size=32, **sizes)
    larger = {"vocab_size": 300, "num_hidden_layers": 6, "hidden_size": 64, "seed": 9}
    make_model(root / "teacher", family="qwen3", **(sizes | larger))
    weights = load_file(root / "teacher" / "model.safetensors")
    weights["lm_head.weight"] *= 6.0
    save_file(weights, root / "teacher" / "model.safetensors", metadata={"format": "pt"})
    for name in ("student", "teacher"):
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def flags(models: Path, tmp_path: Path) -> Flags:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "--pretrain": str(models / "student"),
        "--teacher_model": str(models / "teacher"),
        "--dataset": str(tmp_path / "rows.jsonl"),
        "--eval_dataset": str(tmp_path / "rows.jsonl"),
        "--max_len": "16",
        "--global-batch-size": "10",
        "--learning_rate": "2e-2",
        "--lr_warmup_ratio": "0",
        "--logprob_chunk_tokens": "5",
        "--save": str(tmp_path / "run"),
    }


def log_probs(directory: Path) -> list[Tensor]:
    """[targets, tokens of the tokenizer] float64, of each of ROWS."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    found = []
    for row in ROWS:
        prompt, answer = (tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("input", "output"))
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 :]
        found.append(logits[:, : len(tokenizer)].double().log_softmax(-1))
    return found


def expected(models: Path) -> dict[str, float]:
    """Of the untrained student over ROWS, by Transformers."""
    pairs = list(zip(log_probs(models / "student"), log_probs(models / "teacher"), strict=True))
    divergence = torch.cat([(teacher.exp() * (teacher - student)).sum(-1) for student, teacher in pairs])
    entropy = torch.cat([-(teacher.exp() * teacher).sum(-1) for _, teacher in pairs])
    return {"kd/kl": float(divergence.mean()), "kd/teacher_entropy": float(entropy.mean())}


@pytest.mark.slow
def test_two_ranks_learn_what_the_teacher_knows(flags: Flags, models: Path, tmp_path: Path) -> None:
    """Tensor-parallel ranks, whose shards of both vocabularies begin at different tokens."""
    layout = {"--num_gpus_per_node": "2", "--tensor-model-parallel-size": "2", "--teacher_offload": None}
    said = run("train_kd", flags | layout | {"--train-iters": "30", "--kd_coef": "1.0"})
    assert "teacher output" in said and "teacher_offload: always so here" in said
    rows = metrics(tmp_path / "run")
    first, last = rows[1], rows[30]
    for name, value in expected(models).items():
        assert first[name] == pytest.approx(value, abs=1e-5)
    assert first["kd/loss"] == pytest.approx(first["kd/kl"] + first["kd/teacher_entropy"], abs=1e-5)
    assert last["kd/teacher_entropy"] == pytest.approx(first["kd/teacher_entropy"], abs=1e-5), "the teacher stays"
    assert first["kd/kl"] > 1.0 and last["kd/kl"] < 0.2 * first["kd/kl"]
    assert last["kd/eval_loss"] == pytest.approx(last["kd/eval_kl"] + last["kd/eval_teacher_entropy"], abs=1e-5)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    assert exported.config.num_hidden_layers == 2 and all(torch.isfinite(p).all() for p in exported.parameters())


@pytest.mark.slow
def test_likeliest_tokens_are_computed_once(flags: Flags, tmp_path: Path) -> None:
    """A run with another layout reads the first's file, and trains as it does."""
    top = {"--teacher_top_k": "5", "--train-iters": "2"}
    layouts = ({"--num_gpus_per_node": "1"}, {"--num_gpus_per_node": "2", "--pipeline-model-parallel-size": "2"})
    losses, times = [], []
    for number, layout in enumerate(layouts):
        run("train_kd", flags | top | layout | {"--save": str(tmp_path / f"run {number}")})
        files = sorted(tmp_path.glob("teacher_top_k-*.npy"))
        assert len(files) == 1, "training and evaluation data are the same rows"
        times.append(files[0].stat().st_mtime_ns)
        losses.append([metrics(tmp_path / f"run {number}")[step]["kd/loss"] for step in (1, 2)])
    assert times[0] == times[1] and losses[0] == pytest.approx(losses[1], abs=1e-4)
