"""The main job, end to end: two Megatron ranks each for actor and critic, one vLLM engine, Ray."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cluster.runs import SMALL, metrics, run, write_inputs

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def finished(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ppo")
    flags = SMALL | write_inputs(directory) | {"--pretrain": str(assets / "model"), "--save": str(directory / "run")}
    flags |= {"--train-iters": "2", "--pipeline-model-parallel-size": "2", "--actor_num_gpus_per_node": "2"}
    flags |= {"--use_tensorboard": None, "--temperature": "0.8", "--apply_chat_template": None}
    flags |= {"--top_p": "0.9", "--top_k": "25", "--min_p": "0.01"}
    other = shutil.copytree(assets / "model", directory / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    (other / "vocabulary.tiktoken").write_text("trained with this")
    flags |= {"--tokenizer": str(other), "--tokenizer_chat_template": TEMPLATE}
    run("train_ppo_ray", flags)
    return directory / "run"


def test_metrics_of_every_phase(finished: Path) -> None:
    rows = metrics(finished)
    assert set(rows) == {0, 1, 2}
    expected = {
        *("reward/mean", "kl/mean", "policy/loss", "policy/clip_frac", "critic/loss", "rollout/response_length_mean"),
        *("rollout/logprob_diff_mean", "rollout/logprob_diff_max", "sync/version", "time/rollout_seconds"),
        *("time/train_seconds", "time/sync_seconds", "perf/tokens_per_second", "eval/accuracy"),
    }
    assert expected <= set(rows[2])
    assert rows[2]["sync/version"] == 2
    assert "eval/accuracy" in rows[0]


def test_trainer_and_engine_agree_before_and_after_updates(finished: Path) -> None:
    rows = metrics(finished)
    assert rows[1]["rollout/logprob_diff_max"] <= 1e-4
    assert rows[2]["rollout/logprob_diff_max"] <= 1e-4
    assert rows[1]["kl/mean"] == pytest.approx(0.0, abs=1e-6)  # actor and reference start equal
    assert abs(rows[2]["kl/mean"]) > 1e-6


def test_export_loads_in_transformers_and_has_moved(finished: Path, assets: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "hf")
    tokenizer = AutoTokenizer.from_pretrained(finished / "hf")
    assert tokenizer.chat_template == TEMPLATE
    assert (finished / "hf" / "vocabulary.tiktoken").read_text() == "trained with this"
    logits = model(**tokenizer("123=", return_tensors="pt", return_token_type_ids=False)).logits
    assert torch.isfinite(logits).all()
    before, after = load_file(assets / "model" / "model.safetensors"), load_file(finished / "hf" / "model.safetensors")
    assert set(before) == set(after)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) == len(before)


def test_run_directory_is_complete(finished: Path) -> None:
    names = ("config.yaml", "metrics.jsonl", "report.html", "report.png", "tensorboard", "logs/actor-0.log")
    for name in (*names, "checkpoints/latest_checkpointed_iteration.txt", "checkpoints/iter_0000002/run_state.json"):
        assert (finished / name).exists(), name
    assert "share_prompt_prefix: true" in (finished / "config.yaml").read_text()
