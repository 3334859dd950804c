"""Generating and whole loops with real engines and trainers: equal files and weights, however they came about."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from examples.demo.make_assets import make_model, make_tokenizer
from tests.cluster.runs import Run, run, start
from tests.tiny_models import make_reward_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loop_runs")
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=3).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    rows = [{"input": f"sort {i % 10} {i * 7 % 10}=", "label": f"{i}"} for i in range(24)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    (directory / "reward.py").write_text(
        "def reward_func(queries, prompts, labels):\n"
        "    return [sum(c in '0123456789' for c in q[len(p):]) / 8 for q, p in zip(queries, prompts)]\n"
    )
    return directory


def flags(assets: Path, **more: str | None) -> dict[str, str | None]:
    found: dict[str, str | None] = {
        **{"--pretrain": f"{assets}/model", "--prompt_data": f"{assets}/prompts.jsonl", "--seed": "7"},
        **{"--prompt_max_len": "16", "--generate_max_len": "8", "--vllm_kv_cache_gib": "0.25"},
    }
    return found | {f"--{name}": value for name, value in more.items()}


def kill_when(process: Run, happened: Any) -> None:
    """kill -9 as soon as something has happened."""
    deadline = time.monotonic() + 300
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, process.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_engines_and_kills_change_nothing(assets: Path, tmp_path: Path) -> None:
    def own(name: str, **more: str | None) -> dict[str, str | None]:
        given = {"n_samples_per_prompt": "3", "max_num_seqs": "2", "output": f"{tmp_path}/{name}.jsonl"}
        return flags(assets, **(given | more))

    run("generate", own("whole"))
    run("generate", own("two", vllm_num_engines="2"))
    process = start("generate", own("killed"))
    partial = tmp_path / "killed.jsonl.partial"
    kill_when(process, lambda: partial.exists() and partial.read_bytes().count(b"\n") > 1)
    assert not (tmp_path / "killed.jsonl").exists()
    said = run("generate", own("killed"))
    assert "prompts are answered already" in said
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "two.jsonl").read_bytes() == whole == (tmp_path / "killed.jsonl").read_bytes()
    outputs = [json.loads(line)["output"] for line in whole.splitlines()]
    assert len(outputs) == 72 and len(set(outputs)) > 60

    run("generate", flags(assets, greedy=None, output=f"{tmp_path}/greedy.jsonl"))
    model = AutoModelForCausalLM.from_pretrained(assets / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(assets / "model")
    for row in map(json.loads, (tmp_path / "greedy.jsonl").read_text().splitlines()[:6]):
        ids = tokenizer(row["input"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        found = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        assert row["output"] == tokenizer.decode(found, skip_special_tokens=True)


def test_a_loop_that_is_killed_in_its_stages_ends_with_the_same_weights(assets: Path, tmp_path: Path) -> None:
    """Iterative DPO; rejection sampling differs in the selection and in the trainer, which share their loop."""

    def own(name: str) -> dict[str, str | None]:
        more = {"eval_data": f"{assets}/eval.jsonl", "reward_function": f"{assets}/reward.py", "num_rounds": "2"}
        more |= {"rollout_batch_size": "16", "n_samples_per_prompt": "4", "max_len": "32", "max_epochs": "3"}
        more |= {"global_batch_size": "4", "micro_batch_size": "4", "learning_rate": "1e-3", "save_interval": "2"}
        return flags(assets, **(more | {"method": "iterative_dpo", "save": f"{tmp_path}/{name}"}))

    run("iterate", own("whole"))
    save = tmp_path / "killed"
    for happened in (
        lambda: (save / "round_001/samples.jsonl.partial").exists(),
        lambda: (save / "round_001/score.yaml").exists(),
        lambda: (save / "round_001/train/checkpoints/latest_checkpointed_iteration.txt").exists(),
        lambda: (save / "round_001/eval_generate.yaml").exists(),
        lambda: (save / "round_002/selected.jsonl").exists(),
        lambda: (save / "round_002/train/hf").exists(),
    ):
        kill_when(start("iterate", own("killed")), happened)
    said = run("iterate", own("killed"))
    for number in ("001", "002"):
        for name in ("samples.jsonl", "scored.jsonl", "selected.jsonl", "eval_scored.jsonl"):
            place = f"round_{number}/{name}"
            assert (save / place).read_bytes() == (tmp_path / "whole" / place).read_bytes(), place
    before, whole, killed = (
        load_file(directory / "model.safetensors")
        for directory in (assets / "model", tmp_path / "whole" / "hf", save / "hf")
    )
    assert all(torch.equal(whole[name], killed[name]) for name in whole) and whole.keys() == killed.keys()
    assert any(not torch.equal(before[name], whole[name]) for name in whole)
    assert "eval accuracy" in said
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[2]["select/rows"] > 0


def test_scores_of_a_reward_model_are_those_of_transformers(assets: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": len(make_tokenizer()), "hidden_size": 64, "intermediate_size": 64, "eos_token_id": 2}
    make_reward_model(tmp_path / "rm", seed=5, **sizes)
    AutoTokenizer.from_pretrained(assets / "model").save_pretrained(tmp_path / "rm")
    rows = [
        {"input": f"sort {i // 3} 4=", "output": f"{i}{i}"[: i % 5], "place": i // 3}
        | {"finish_reason": "length" if i % 2 else "stop"}
        for i in range(20)
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, str | None] = {"--dataset": f"{tmp_path}/samples.jsonl", "--output": f"{tmp_path}/scored.jsonl"}
    layout = {"--reward_num_gpus_per_node": "2", "--reward_pipeline_model_parallel_size": "2"}
    run("score", given | layout | {"--reward_pretrain": f"{tmp_path}/rm", "--max_len": "64"})
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    found = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [row["reward"] is None for row in found] == [row["output"] == "" for row in rows]
    for row in found:
        if row["reward"] is not None:
            ids = tokenizer(row["input"] + row["output"], add_special_tokens=False)["input_ids"]
            ids += [tokenizer.eos_token_id] if row["finish_reason"] == "stop" else []
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            assert row["reward"] == pytest.approx(model.score(hidden).item(), abs=1e-5)
