"""The command lines of train_ppo and train_ppo_ray that OpenRLHF 0.5's users know, as its README has them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarlhf.config.arguments import PPOConfig
from megarlhf.config.checks import check_ppo
from megarlhf.config.command_line import parse, to_dict
from tests.cluster.runs import Run, metrics
from tests.tiny_models import make_model, make_reward_model

COMMON = """--pretrain M --reward_pretrain R --save_path P --save_steps -1 --logging_steps 1 --eval_steps -1
    --train_batch_size 128 --rollout_batch_size 1024 --max_epochs 1 --prompt_max_len 1024 --generate_max_len 1024
    --bf16 --actor_learning_rate 5e-7 --critic_learning_rate 9e-6 --init_kl_coef 0.01 --prompt_data D
    --input_key context_messages --apply_chat_template --max_samples 100000 --normalize_reward --adam_offload
    --flash_attn --gradient_checkpointing --use_wandb TOKEN"""
LINES = {
    "train_ppo": f"{COMMON} --micro_train_batch_size 2 --micro_rollout_batch_size 4 --zero_stage 2",
    "train_ppo_ray": f"""--ref_num_nodes 1 --ref_num_gpus_per_node 2 --reward_num_nodes 1 --reward_num_gpus_per_node 2
        --critic_num_nodes 1 --critic_num_gpus_per_node 2 --actor_num_nodes 1 --actor_num_gpus_per_node 2
        --vllm_num_engines 2 --vllm_tensor_parallel_size 2 --colocate_critic_reward --colocate_actor_ref {COMMON}
        --micro_train_batch_size 8 --micro_rollout_batch_size 16 --zero_stage 3 --packing_samples""",
}
ALSO = [  # what may stand on these lines too, and what it is here
    ("train_ppo", "--remote_rm_url http://localhost:5000/get_reward", {}),
    ("train_ppo_ray", "--advantage_estimator reinforce", {"advantage_estimator": "reinforce"}),
    ("train_ppo_ray", "--advantage_estimator rloo --n_samples_per_prompt 4", {"n_samples_per_prompt": 4}),
    ("train_ppo_ray", "--vllm_sync_backend nccl", {"vllm_num_engines": 2}),
]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def words_of(program: str, directory: Path) -> list[str]:
    """A line's words with names of this machine."""
    names = {"D": "data.jsonl", "M": "model", "R": "reward", "P": "run"}
    return [str(directory / names[word]) if word in names else word for word in LINES[program].split()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models and data as far as the configuration's check looks."""
    monkeypatch.setenv("WANDB_API_KEY", "")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 42}
    for name in ("model", "reward"):
        (tmp_path / name).mkdir()
        content = json.dumps(sizes | {"max_position_embeddings": 2048, "mean": 0.5, "std": 2.0})
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "data.jsonl").write_text("{}\n")
    return tmp_path


@pytest.mark.parametrize("program", LINES)
def test_the_line_is_understood(place: Path, program: str) -> None:
    config, dry_run = parse(PPOConfig, words_of(program, place), program)
    assert check_ppo(config) == [] and not dry_run
    expected = {
        **{"global_batch_size": 128, "micro_batch_size": 8 if "ray" in program else 2, "rollout_batch_size": 1024},
        **{"save_interval": None, "eval_interval": None, "bf16": True, "recompute_granularity": "full"},
        **{"actor_learning_rate": 5e-7, "init_kl_coef": 0.01, "max_samples": 100000, "normalize_reward": True},
        **{"actor_num_gpus_per_node": 2 if "ray" in program else 1, "num_episodes": 1, "train_iters": None},
        **{"vllm_tensor_parallel_size": 2 if "ray" in program else 1, "colocate_all_models": True, "use_wandb": True},
        "optimizer_cpu_offload": True,
    }
    values = to_dict(config)
    assert {name: values.get(name, "no such option") for name in expected} == expected


@pytest.mark.parametrize(("program", "more", "expected"), ALSO)
def test_what_may_stand_there_too(place: Path, program: str, more: str, expected: dict[str, object]) -> None:
    config, _ = parse(PPOConfig, [*words_of(program, place), *more.split()], program)
    values = to_dict(config)
    assert check_ppo(config) == [] and {name: values[name] for name in expected} == expected


def make_terse(directory: Path) -> None:
    """Let the model end about every second response with each token, so that 1024 of them are quick."""
    path = directory / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0.0  # what layers add leaves this number of the residual as it is
    weights["model.embed_tokens.weight"][:, 0] = 10.0
    weights["model.norm.weight"].fill_(1.0)
    weights["lm_head.weight"][:, 0] = 0.0
    weights["lm_head.weight"][2, 0] = 0.6  # times 8, the root of the hidden size, that is a logit of almost 5
    save_file(weights, path, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("program", LINES)
def test_the_line_runs_to_its_report(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    sizes = json.loads((assets / "model" / "config.json").read_text())["vocab_size"]
    options: dict[str, object] = {"vocab_size": sizes, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    make_model(tmp_path / "model", **options)
    make_terse(tmp_path / "model")
    make_reward_model(tmp_path / "reward", seed=5, entries={"mean": 0.5, "std": 2.0}, **options)
    for name in ("model", "reward"):
        for file in (assets / "model").glob("*token*"):
            shutil.copy(file, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(TEMPLATE)
    chats = [[{"role": "user", "content": f"{i}+{i}="}] for i in range(1024)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"context_messages": chat}) + "\n" for chat in chats))
    process = Run([sys.executable, "-m", f"megarlhf.cli.{program}", *words_of(program, tmp_path)])
    try:
        assert process.wait(timeout=580) == 0, process.read()
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    logged = metrics(tmp_path / "run")
    assert list(logged) == [0, 1], "one pass over the prompts"
    assert {"policy/loss", "critic/loss", "reward/reward_model/mean", "kl/mean"} <= logged[1].keys()
    assert logged[1]["rollout/response_length_mean"] < 10 and logged[1]["reward/no_result_count"] == 0
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "hf" / "model.safetensors").is_file()
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    assert "TOKEN" not in process.read() and "other users of this machine can read a key" in process.read()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "run/hf"))
    assert any(not torch.equal(before[name].bfloat16(), after[name].bfloat16()) for name in before)
