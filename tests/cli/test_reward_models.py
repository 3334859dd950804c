"""Reward models of score, iterate, serve-rm and eval: what is wrong is told at set-up, and the plan is shown."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.demo.make_assets import make_tokenizer
from megarlhf.cli import reward_models
from megarlhf.cli import run as programs
from megarlhf.cli.main import main
from megarlhf.planner.placement import Machine
from tests.tiny_models import make_model, make_reward_model

PROGRAMS = ["score", "serve-rm", "iterate", "eval"]
Start = Callable[..., tuple[int, str, str]]


@pytest.fixture
def start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Start:
    tokenizer = make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64, "eos_token_id": 2}
    make_reward_model(tmp_path / "rm", **sizes)
    make_model(tmp_path / "model", **sizes)
    for name in ("rm", "model"):
        tokenizer.save_pretrained(tmp_path / name)
    row = {"input": "ask 1", "output": "2", "label": "2"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    policy = [f"--pretrain={tmp_path}/model", "--prompt_max_len=16", "--generate_max_len=8"]
    prompts, save = f"--prompt_data={tmp_path}/rows.jsonl", f"--save={tmp_path}/run"
    method = ["--method=rejection_sampling", "--rollout_batch_size=1", "--global_batch_size=1", "--max_len=64"]
    flags = {
        "score": [f"--dataset={tmp_path}/rows.jsonl", f"--output={tmp_path}/scored.jsonl", "--max_len=64"],
        "serve-rm": ["--max_len=64"],
        "iterate": [*policy, prompts, save, *method],
        "eval": [*policy, f"--eval_data={tmp_path}/rows.jsonl", f"--output={tmp_path}/found.json"],
        "ppo": [*policy, prompts, save, "--advantage_estimator=reinforce"],
    }

    def run(program: str, *more: str) -> tuple[int, str, str]:
        given = [*flags[program], f"--reward_pretrain={tmp_path}/rm", "--dry-run", *more]
        return main([program, *given]), *capsys.readouterr()

    return run


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_dry_run_shows_the_plan(start: Start, program: str) -> None:
    layout = ("--reward_num_gpus_per_node=4", "--reward_pipeline_model_parallel_size=4")
    status, said, wrong = start(program, *layout, "--gpu_memory_gib=7")
    assert status == 0, wrong
    shown = said[re.search(r"^role +rank", said, re.M).start() :]  # type: ignore[union-attr]
    assert re.search(r"^reward +3 \(pp3\) +0 +\S+ +1 +reward$", shown, re.M)
    assert re.search(r"^reward +parameters +.*\d$", shown, re.M) and "GiB of 7 left" in shown
    assert ("rollout" in shown) == (program == "eval")
    assert not re.search("actor|sync|gathered", shown), "nothing is trained"


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_wrong_comes_together(
    start: Start, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with fewer GPUs than are asked for, which needs what is not installed, and with a bad tokenizer."""
    monkeypatch.setattr(reward_models, "find_machine", lambda config: Machine.alike("gpu", 1, 1, 2))
    for file in (tmp_path / "rm").glob("tokenizer*"):
        file.write_text("{")
    status, _, said = start(program, "--reward_num_gpus_per_node=2")
    assert status == 2
    for words in ("reward_num_gpus_per_node=2 GPUs do not fit on 1 node(s) with 1 GPU(s)", "transformer_impl=", "rm"):
        assert words in said, words


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_does_not_fit_is_refused(start: Start, program: str) -> None:
    status, _, said = start(program, "--gpu_memory_gib=0.001")
    assert status == 2
    assert "gpu_memory_gib=0.001; " in said and "phase reward takes" in said
    assert ": set bf16, a larger reward_tensor_model_parallel_size" in said


def test_what_is_left_of_a_gpu_for_a_model_beside_engines(start: Start) -> None:
    """Engines have half of it asleep or awake, and the process of each another GiB."""
    assert start("eval", "--gpu_memory_gib=4", "--vllm_gpu_memory_utilization=0.49")[0] == 0
    status, _, said = start("eval", "--gpu_memory_gib=4", "--vllm_gpu_memory_utilization=0.6")
    assert status == 2 and "phase rollout takes" in said and "phase reward takes" not in said


@pytest.mark.parametrize("program", ["score", "ppo"])
def test_the_kernels_of_every_model_are_checked(
    start: Start, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (reward_models, programs):
        monkeypatch.setattr(module, "resolve_transformer_impl", lambda asked, device: "transformer_engine")
    two = (f"--reward_pretrain={tmp_path}/rm,{tmp_path}/rm", "--reward_num_gpus_per_node=2")
    status, _, said = start(program, *two, "--reward_context_parallel_size=2,1")
    assert status == 2 and said.count("bf16=False with reward_context_parallel_size=2") == 1, said
